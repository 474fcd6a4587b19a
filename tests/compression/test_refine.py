"""Refining: cores come closer to the outputs of the dense model, and nothing else moves."""

import copy

import pytest
import torch
from torch import nn

from tenzoo.compression import apply_, plan, refine_
from tests.compression.test_plan import IMAGES, network
from tests.factorizations.formats import NAMES

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


def pair(factorization="tt"):
    """A dense model, and a compressed one."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 32))
    small = apply_(copy.deepcopy(dense), plan(dense, factorization=factorization, ranks=0.4))
    return dense, small


def distance(model, dense, x=X):
    with torch.no_grad():
        return float((copy.deepcopy(model).eval()(x) - copy.deepcopy(dense).eval()(x)).norm())


def numbers(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("factorization", NAMES)
def test_the_outputs_come_closer(factorization):
    dense, small = pair(factorization)
    before = distance(small, dense)
    assert refine_(small, dense, calibration=X, epochs=30) is small
    assert distance(small, dense) < 0.95 * before


def test_convolutions_with_normalization():
    dense = network().float().train()
    small = apply_(copy.deepcopy(dense), plan(dense, factorization="tt", budget=0.5))
    images = IMAGES.float()
    before, held = distance(small, dense, images), numbers(small)
    refine_(small, dense, calibration=images)
    assert distance(small, dense, images) < before
    moved = {name for name, value in small.state_dict().items() if not value.equal(held[name])}
    assert moved
    assert all(".factorization." in name for name in moved)


def test_nothing_else_is_touched():
    dense, small = pair()
    small[3].factorization.requires_grad_(False)
    small(X).sum().backward()
    gradient = small[0].factorization.cores[0].grad.clone()
    held, others = numbers(small), numbers(dense)
    state = torch.get_rng_state()
    refine_(small, dense, calibration=X, epochs=2)
    assert torch.get_rng_state().equal(state)
    assert small.training
    assert dense.training
    assert small[0].factorization.cores[0].grad.equal(gradient)
    assert small[3].factorization.cores[0].grad is None
    assert all(value.equal(others[name]) for name, value in dense.state_dict().items())
    moved = {name for name, value in small.state_dict().items() if not value.equal(held[name])}
    assert moved == {"0.factorization.cores.0", "0.factorization.cores.1"}


def test_twice_is_the_same():
    dense, small = pair()
    other = copy.deepcopy(small)
    for each in (small, other):
        refine_(each, dense, calibration=X, epochs=2)
    assert all(value.equal(other.state_dict()[name]) for name, value in small.state_dict().items())


def test_cores_that_are_exact_stay():
    dense, _ = pair()
    small = apply_(copy.deepcopy(dense), plan(dense, factorization="tt", ranks={"0": 7})).eval()
    exact = nn.Sequential(small[0].to_dense(), *(copy.deepcopy(layer) for layer in small[1:]))
    held = numbers(small)
    small[0].implementation = "reconstruct"
    refine_(small, exact, calibration=X)
    assert distance(small, exact) < 1e-4
    assert all(torch.allclose(value, held[name], atol=1e-5) for name, value in small.state_dict().items())


def test_steps_that_lead_away_are_not_kept(monkeypatch):
    dense, small = pair()
    monkeypatch.setattr("tenzoo.compression.refine._STEP", 1e6)
    held = numbers(small)
    refine_(small, dense, calibration=X)
    assert all(value.equal(held[name]) for name, value in small.state_dict().items())


def test_after_steps_that_lead_away_come_shorter_ones(monkeypatch):
    dense, small = pair()
    monkeypatch.setattr("tenzoo.compression.refine._STEP", 0.3)
    before = distance(small, dense)
    refine_(small, dense, calibration=X, epochs=10)
    assert distance(small, dense) < before


def test_the_scale_of_the_cores_does_not_matter():
    dense, small = pair()
    other = copy.deepcopy(small)
    with torch.no_grad():
        for layer in (other[0], other[3]):
            layer.factorization.cores[0].mul_(2.0**10)
            layer.factorization.cores[1].mul_(2.0**-10)
    for each in (small, other):
        refine_(each, dense, calibration=X)
    assert distance(small, dense) == pytest.approx(distance(other, dense), rel=1e-3)


def test_weights_of_attention():
    torch.manual_seed(0)
    dense = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    small = apply_(copy.deepcopy(dense), plan(dense, factorization="tt", budget=0.6))
    x = torch.randn(32, 5, 16)
    before = distance(small, dense, x)
    refine_(small, dense, calibration=x)
    assert distance(small, dense, x) < before


def test_masked_outputs_do_not_count():
    class Masked(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).masked_fill(x > 1, -torch.inf)

    dense, small = (Masked(model) for model in pair())
    with torch.no_grad():
        y = dense.eval()(X)
    seen = y.isfinite()

    def error():
        with torch.no_grad():
            return float((small.eval()(X) - y)[seen].norm())

    before = error()
    refine_(small, dense, calibration=X)
    assert error() < before


def test_an_error_in_the_model_leaves_the_cores():
    dense, small = pair()

    class Fails(nn.Module):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            if type(self).calls == 8:
                raise RuntimeError("the eighth call")
            return x

    small.append(Fails())
    held = numbers(small)
    with pytest.raises(ValueError, match="the eighth call"):
        refine_(small, dense, calibration=X)
    assert all(value.equal(held[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize("epochs", [0, -1, True, 1.5])
def test_epochs_that_are_none(epochs):
    dense, small = pair()
    with pytest.raises((TypeError, ValueError), match=rf"in `epochs`, got {epochs}"):
        refine_(small, dense, calibration=X, epochs=epochs)


def test_a_model_without_cores_that_may_move():
    dense, small = pair()
    for model in (copy.deepcopy(dense), small.requires_grad_(False)):
        with pytest.raises(ValueError, match="expected cores that may be trained in `model`, got none"):
            refine_(model, dense, calibration=X)


def test_half_precision():
    dense, small = pair()
    with pytest.raises(
        ValueError, match=r"single or double precision in `model`, got torch.bfloat16; call model.float\(\)"
    ):
        refine_(small.bfloat16(), dense, calibration=X)


def test_what_is_no_module():
    _, small = pair()
    with pytest.raises(TypeError, match=r"expected an nn\.Module in `dense`, got a str"):
        refine_(small, "resnet18", calibration=X)


def test_another_model():
    dense, small = pair()
    with pytest.raises(ValueError, match=r"in `dense`, got one with outputs of shapes \[\(16, 7\)\] where `model` has"):
        refine_(small, nn.Linear(32, 7), calibration=X)
    with pytest.raises(ValueError, match="from before it was compressed in `dense`, got `model` itself"):
        refine_(small, small, calibration=X)
    with torch.no_grad():
        small[0].factorization.cores[0].fill_(torch.nan)
    with pytest.raises(ValueError, match="whose outputs on `calibration` are numbers, got NaN"):
        refine_(small, dense, calibration=X)


def test_a_model_on_the_meta_device():
    dense, small = pair()
    with pytest.raises(ValueError, match="expected numbers in `model`, got cores on the meta device"):
        refine_(small.to("meta"), dense, calibration=X)


class Encoder(nn.Module):
    """Its output at padding is as large as elsewhere, and depends on what stands there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(50, 32), nn.Linear(32, 32)

    def forward(self, input_ids, attention_mask):
        return self.layer(torch.tanh(self.table(input_ids)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_counts_for_nothing(dtype):
    torch.manual_seed(0)
    tokens, mask = torch.randint(0, 50, (40, 9)), torch.ones(40, 9, dtype=dtype)
    mask[:, 5:] = 0
    found = []
    for padding in (0, 7):
        tokens = tokens.where(mask != 0, padding)
        calibration = {"input_ids": tokens, "attention_mask": mask}
        dense = Encoder()
        made = plan(dense, factorization="tt", budget=0.4, calibration=calibration)
        small = apply_(copy.deepcopy(dense), made, calibration=calibration)
        refine_(small, dense, calibration=calibration)
        held = tokens[-10:]
        with torch.no_grad():
            y, x = (model(held, mask[-10:])[:, :5] for model in (dense, small))
        assert float((x - y).norm() / y.norm()) < made.output_error
        found.append([made.output_error, float((x - y).norm()), *(layer.rank[0] for layer in made.layers)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
