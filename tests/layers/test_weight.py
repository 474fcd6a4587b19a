"""The weight of a layer of cores for code outside of it: it is read as any tensor, and writing is refused."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tenzoo.layers import TensorizedConv2d, TensorizedLinear

REFUSED = r"expected a weight of its own for .*, got one that cores reconstruct; change `layer\.factorization`, or call"


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return TensorizedLinear(6, 8, factorization="tt", rank=2)


def test_it_is_read_as_a_tensor_with_gradients_to_the_cores(layer):
    x = torch.randn(3, 6)
    weight = layer.weight
    assert (weight.dtype, weight.device.type, tuple(weight.shape)) == (torch.float32, "cpu", (8, 6))
    torch.testing.assert_close(F.linear(x, weight, layer.bias), layer(x))
    for number in ((weight**2).sum(), weight.norm(), (x @ weight.t()).sum(), weight[2:, 1].sum(), weight.view(-1)[3]):
        cores = list(layer.factorization.cores)
        assert all(grad is not None for grad in torch.autograd.grad(number, cores, retain_graph=True))


INITIALIZATIONS = [
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.trunc_normal_,
    nn.init.zeros_,
    nn.init.ones_,
    nn.init.eye_,
    nn.init.xavier_uniform_,
    nn.init.xavier_normal_,
    nn.init.kaiming_uniform_,
    nn.init.kaiming_normal_,
    nn.init.orthogonal_,
    lambda weight: nn.init.constant_(weight, 0.5),
    lambda weight: nn.init.sparse_(weight, 0.5),
]


@pytest.mark.parametrize("initialize", INITIALIZATIONS)
@pytest.mark.parametrize("part", [lambda weight: weight, lambda weight: weight.data, lambda weight: weight[1:]])
def test_initializations_are_refused(layer, initialize, part):
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=REFUSED):
        initialize(part(layer.weight))
    assert layer.weight.equal(before)


def test_an_initialization_of_a_kernel_is_refused():
    with pytest.raises(RuntimeError, match=REFUSED):
        nn.init.dirac_(TensorizedConv2d(4, 4, 3, factorization="tt", rank=2).weight)


def assign_data(weight):
    weight.data = torch.zeros(8, 6)


def assign_row(weight):
    weight[0] = 1.0


def multiply(weight):
    weight *= 2.0


WRITES = [
    assign_data,
    assign_row,
    multiply,
    lambda weight: weight.data.mul_(0.5),
    lambda weight: weight.t().fill_(0),
    lambda weight: weight.requires_grad_(False),
    lambda weight: torch.add(weight, 1, out=weight),
    lambda weight: torch._foreach_zero_([weight]),
]


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_writing_is_refused(layer, write):
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match=REFUSED):
        write(layer.weight)
    assert layer.weight.equal(before)


@torch.no_grad()
def test_what_takes_the_memory_of_data_writes_elsewhere(layer):
    layer.eval()
    before = layer.weight.clone()
    other = nn.Linear(6, 8)
    other.weight.data = layer.weight.data
    nn.init.zeros_(other.weight)
    assert layer.weight.equal(before)


def test_a_file_has_a_plain_tensor(layer, tmp_path):
    torch.save({"weight": layer.weight}, tmp_path / "weight.pt")
    read = torch.load(tmp_path / "weight.pt", weights_only=True)["weight"]
    assert type(read) is Tensor
    assert read.equal(layer.weight)


WRITES = {
    "chunk": lambda weight: [part.zero_() for part in weight.chunk(4)],
    "split": lambda weight: [part.zero_() for part in weight.split(2)],
    "rows": lambda weight: [row.zero_() for row in weight],
    "unbind": lambda weight: weight.unbind(1)[0].fill_(1.0),
    "relu": lambda weight: F.relu(weight, inplace=True),
    "dropout": lambda weight: F.dropout(weight, 0.5, inplace=True),
    "by name": lambda weight: torch.clamp_(input=weight, min=0),
    "data": lambda weight: weight.data.mul_(2),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("training", [True, False])
def test_writes_into_parts_are_refused(layer, write, training):
    layer.train(training)
    with torch.no_grad(), pytest.raises(RuntimeError, match=REFUSED):
        WRITES[write](layer.weight)


def test_what_is_copied_is_the_readers_own(layer):
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = layer.eval()(x).clone()
        layer.weight.numpy().fill(0)
        layer.weight.detach().zero_()
        copy.deepcopy(layer.weight.detach()).zero_()
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    parameter = nn.Parameter(layer.weight.detach())
    assert type(parameter) is nn.Parameter
    torch.testing.assert_close(parameter.detach(), layer.dense_weight().detach(), rtol=0, atol=0)
