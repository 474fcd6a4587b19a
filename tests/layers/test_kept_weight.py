"""The dense weight that is kept between calls: when, and until when."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.layers.makers import conv, linear


def step_fused(parameters):
    """A step that no version counter sees."""
    parameters = list(parameters)
    before = [parameter._version for parameter in parameters]
    torch.optim.SGD(parameters, lr=1e-3, fused=True).step()
    assert [parameter._version for parameter in parameters] == before


def test_a_kept_weight_is_the_same_object_until_something_changes():
    layer = conv(dtype=torch.float64).eval()
    with torch.no_grad():
        kept = layer.dense_weight()
        assert layer.dense_weight() is kept
        layer.factorization.cores[0].mul_(2)
        assert layer.dense_weight().allclose(2 * kept)
        kept = layer.dense_weight()
        layer.factorization.cores[0] = nn.Parameter(3 * layer.factorization.cores[0])
        assert layer.dense_weight().allclose(3 * kept)


def test_a_convolution_lays_its_kept_weight_out_once():
    layer = conv(implementation="reconstruct").eval()
    x, used = torch.randn(2, 6, 5, 5), []
    layer._conv_forward = lambda x, weight, bias: used.append(weight)
    with torch.no_grad():
        layer(x)
        layer(x)
        layer(x.to(memory_format=torch.channels_last))
    assert used[0].is_contiguous()
    assert used[0] is used[1] is used[2]
    layer.to(memory_format=torch.channels_last)
    with torch.no_grad():
        layer(x.to(memory_format=torch.channels_last))
    assert used[3].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_fused_optimizer_leaves_no_stale_weight(training):
    """A frozen network is trained in evaluation mode; what was kept before the step must not be used after it."""
    torch.manual_seed(0)
    layer, x = conv().train(training), torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        before = layer.eval()(x)
        layer.train(training)
        layer(x)
    layer(x).square().mean().backward()
    step_fused(layer.parameters())
    with torch.no_grad():
        after = layer.train(training)(x) if training else layer(x)
    assert not after.allclose(before)
    torch.testing.assert_close(after, layer.to_dense()(x))


def assert_fresh(layer):
    with torch.no_grad():
        torch.testing.assert_close(layer.dense_weight(), layer.to_dense().weight, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_weight_kept_between_backward_pass_and_fused_step_is_dropped(optimizer):
    torch.manual_seed(0)
    layer, x = conv().eval(), torch.randn(2, 6, 5, 5)
    stepper = optimizer(layer.parameters(), 0.1, fused=True)
    for _ in range(3):
        layer(x).square().mean().backward()
        with torch.no_grad():
            kept = layer.dense_weight()
        stepper.step()
        assert_fresh(layer)
        assert not layer.dense_weight().allclose(kept)


def test_an_optimizer_that_writes_to_the_data_leaves_no_stale_weight():
    class Old(torch.optim.Optimizer):
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(1)

    layer = conv().eval()
    optimizer = Old(layer.parameters(), {})
    with torch.no_grad():
        layer.dense_weight()
    optimizer.step()
    assert_fresh(layer)


def test_an_average_that_follows_an_optimizer_leaves_no_stale_weight():
    """A teacher is frozen, in evaluation mode, and often updated through ``.data``."""
    student, teacher = conv(), conv().eval().requires_grad_(False)
    optimizer, x = torch.optim.SGD(student.parameters(), 0.1), torch.randn(2, 6, 5, 5)
    for _ in range(3):
        with torch.no_grad():
            teacher(x)
        student(x).square().mean().backward()
        optimizer.step()
        for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.data.mul_(0.9).add_(other.data, alpha=0.1)
        assert_fresh(teacher)


@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_step_leaves_no_stale_weight(fused):
    torch._dynamo.reset()
    layer, x = conv().eval(), torch.randn(2, 6, 5, 5)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, fused=fused)
    step = torch.compile(optimizer.step, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            layer(x).square().mean().backward()
            with torch.no_grad():
                layer.dense_weight()
            step()
            assert_fresh(layer)


def test_memory_given_to_the_cores_leaves_no_stale_weight():
    """As by evolution strategies; the second of two vectors may lie where the one before the first was."""
    layer = conv().eval()
    size = sum(parameter.numel() for parameter in layer.parameters())
    for _ in range(8):
        with torch.no_grad():
            layer.dense_weight()
            for _ in range(2):
                nn.utils.vector_to_parameters(torch.randn(size), layer.parameters())
        assert_fresh(layer)


def test_cores_in_shared_memory_leave_no_stale_weight():
    layer = conv().eval().share_memory()
    with torch.no_grad():
        layer.dense_weight()
    layer.factorization.cores[0].data.add_(1)  # as another process would
    assert_fresh(layer)


def test_what_is_written_into_a_kept_weight_does_not_stay():
    layer = conv().eval()
    with torch.no_grad():
        layer.dense_weight().mul_(2)
    assert_fresh(layer)


def test_data_of_other_strides_leaves_no_stale_weight():
    layer = linear("cp", rank=8).eval()
    with torch.no_grad():
        layer.dense_weight()
    layer.factorization.cores[0].data = layer.factorization.cores[0].data.t()
    assert_fresh(layer)


@pytest.mark.parametrize("change", ["eval", "load_state_dict", "to", "data"])
def test_what_drops_a_kept_weight(change):
    torch.manual_seed(0)
    layer, other = conv().eval(), conv()
    with torch.no_grad():
        kept = layer.dense_weight()
        if change == "load_state_dict":
            layer.load_state_dict(other.state_dict())
            assert layer.dense_weight().equal(other.dense_weight())
        elif change == "to":
            assert layer.double().dense_weight().dtype == torch.float64
        else:
            layer.factorization.cores[0].data.mul_(2)
            layer.eval() if change == "eval" else layer.train().eval()
            assert layer.dense_weight().allclose(2 * kept)


def test_a_weight_kept_in_inference_mode_serves_a_later_backward_pass():
    layer, x = conv().eval(), torch.randn(2, 6, 5, 5)
    with torch.inference_mode():
        layer(x)
    with torch.no_grad():
        assert not layer.dense_weight().is_inference()
    layer(x).sum().backward()
    assert all(core.grad is not None for core in layer.factorization.cores)


def test_copies_and_pickles_hold_no_kept_weight(layer_and_input):
    layer, x = layer_and_input
    layer.eval()
    with torch.no_grad():
        expected = layer(x)
        size = len(pickle.dumps(layer))
        layer.dense_weight()
        assert abs(len(pickle.dumps(layer)) - size) < 500
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other(x).equal(expected)
            other.factorization.cores[0].mul_(2)
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert not any("cached" in name for name in layer.state_dict())
