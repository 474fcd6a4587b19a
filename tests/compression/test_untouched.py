"""What the runs of a plan leave in a model: nothing, and the next run begins where the first one did."""

import copy
import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from tenzoo.compression import apply_, plan


def inputs():
    return torch.randn(24, 32, generator=torch.Generator().manual_seed(0))


def planned(model, x):
    parameters = sum(each.numel() for each in model.parameters())
    return plan(model, factorization="tt", budget=parameters - 700, calibration=x)


class Network(nn.Module):
    """Two layers, and between them something that remembers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x):
        return self.last(self.between(torch.relu(self.first(x))))


class Statistics(Network):
    """Running statistics that are parameters."""

    def __init__(self):
        super().__init__()
        self.count = nn.Parameter(torch.zeros((), dtype=torch.long), requires_grad=False)
        self.mean = nn.Parameter(torch.zeros(32), requires_grad=False)
        self.table = nn.Parameter(torch.zeros(2**14, 32), requires_grad=False)

    def between(self, y):
        self.count += len(y)
        self.mean.mul_(0.9).add_(0.1 * y.mean(0))
        self.table[: len(y)] += y
        return y - self.mean + self.table[: len(y)].mean()

    def state(self):
        return self.count.item(), self.mean.tolist(), self.table.abs().sum().item()


class Behind(Network):
    """Tensors that are changed where torch does not count versions, or get other memory."""

    def __init__(self):
        super().__init__()
        self.mean, self.moved = (nn.Parameter(torch.ones(32), requires_grad=False) for _ in range(2))
        self.large = torch.ones(2**19)
        self.memory = self.moved.data_ptr()

    def between(self, y):
        self.mean.data.mul_(0.5)
        self.large.data.mul_(0.5)
        self.moved.data = self.moved.data + 1
        return y + self.mean

    def state(self):
        return self.mean.tolist(), self.moved.tolist(), self.moved.data_ptr() == self.memory, self.large.mean().item()


class Attributes(Network):
    """Objects of many kinds, in attributes and within each other."""

    def __init__(self):
        super().__init__()
        self.mem, self.hist, self.cache, self.recent = torch.zeros(32), [], {"n": [0]}, deque(maxlen=2)
        self.seen, self.array, self.large, self.pair = {-1}, np.zeros(3), torch.zeros(2**19), (torch.zeros(1), [0])
        self.norms = [nn.BatchNorm1d(32)]
        self.draws = [torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1)]
        self.register_buffer("calls", torch.zeros(()))

    def between(self, y):
        self.mem.mul_(0.9).add_(y.mean(0))
        self.hist.append(float(y.mean()))
        self.cache[len(self.hist)] = y
        self.cache["n"][0] += 1
        self.recent.append(y)
        self.seen.add(len(self.hist))
        self.array += 1
        self.large += 1
        self.pair[0].add_(1)
        self.pair[1][0] += 1
        self.calls += 1
        own, numpy, python = self.draws
        y = y * (torch.rand((), generator=own) + numpy.random() + python.random() + self.calls)
        return self.norms[0](y) + self.mem

    def state(self):
        own, numpy, python = copy.deepcopy(self.draws)
        return (
            (self.mem.tolist(), self.hist, list(self.cache), self.cache["n"], len(self.recent), self.seen),
            (self.array.tolist(), self.large.sum().item(), self.pair[0].item(), self.pair[1], self.calls.item()),
            (self.norms[0].running_mean.tolist(), torch.rand((), generator=own).item()),
            (numpy.random(), python.random()),
        )


class Registers(Network):
    """Buffers, parameters and modules that the first forward pass makes."""

    def __init__(self):
        super().__init__()
        self.made = False

    def between(self, y):
        if not self.made:
            self.register_buffer("cos", torch.linspace(0, 1, 32).cos())
            self.register_buffer("sin", torch.linspace(0, 1, 32).sin(), persistent=False)
            self.scale, self.norm = nn.Parameter(torch.ones(32)), nn.LayerNorm(32)
            self.made = True
        return self.norm(y * self.cos + y.flip(1) * self.sin) * self.scale

    def state(self):
        kept = self._non_persistent_buffers_set
        return self.made, list(self.state_dict()), list(dict(self.named_buffers())), list(self._modules), len(kept)


KINDS = [Statistics, Behind, Attributes, Registers]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_leaves_what_a_model_holds(kind):
    model = kind()
    state, weights = copy.deepcopy(model.state()), copy.deepcopy(model.state_dict())
    held = {name: id(value) for name, value in vars(model).items()}
    planned(model, inputs())
    assert model.state() == state
    assert list(model.state_dict()) == list(weights)
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    assert {name: id(value) for name, value in vars(model).items()} == held


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_leaves_what_a_compressed_model_holds(kind):
    model, x = kind(), inputs()
    state, made = copy.deepcopy(model.state()), planned(model, x)
    own = list(model._buffers), list(model._modules)
    apply_(model, made, calibration=x, example_input=x)
    assert (list(model._buffers), list(model._modules)) == own
    if kind is not Registers:  # whose names are those of the cores too
        assert model.state() == state


class Tables(Network):
    """Fills a cache from a layer in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.table, self.cache = nn.Linear(32, 32), {}

    def between(self, y):
        if self.training:
            return y + self.table(y)
        if "t" not in self.cache:
            self.cache["t"] = self.table(torch.eye(32))
        return y @ self.cache["t"]


def test_a_cache_that_a_trial_fills_is_not_the_compressed_model_s():
    x = inputs()
    one, two = Tables(), Tables()
    made = plan(one, factorization="tt", ranks=4, calibration=x)
    apply_(one, made, calibration=x)
    apply_(two, made, calibration=x, example_input=x)
    plain = plan(Tables(), factorization="tt", ranks=4)
    three, four = apply_(Tables(), plain), apply_(Tables(), plain, example_input=x)
    assert one.cache == two.cache == four.cache == {}
    with torch.no_grad():
        assert one.eval()(x).equal(two.eval()(x))
        assert three.eval()(x).equal(four.eval()(x))


class Returns(Network):
    """Returns what it holds and changes."""

    def __init__(self):
        super().__init__()
        self.mem, self.outputs = torch.zeros(24, 10), []

    def forward(self, x):
        y = self.last(torch.relu(self.first(x)))
        self.mem.narrow(0, 0, len(y)).copy_(y)
        self.outputs.append(self.mem[: len(y)])
        return self.outputs


def test_outputs_that_a_model_holds_are_those_of_the_run():
    class Plain(Network):
        def between(self, y):
            return y

    x = inputs()
    model, plain = Returns(), Plain()
    found, expected = planned(model, x), planned(plain, x)
    assert found.output_error == expected.output_error > 0
    assert model.mem.count_nonzero() == 0
    assert model.outputs == []


class Merging(nn.Linear):
    """A layer of LoRA that merges in evaluation mode, as loralib's does."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight.requires_grad = False
        self.a, self.b = nn.Parameter(torch.randn(4, sizes[0])), nn.Parameter(torch.randn(sizes[1], 4))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        SWITCHED.append((id(self), mode))
        if mode == self.merged:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.t() @ self.b.t()


SWITCHED = []


def test_layers_that_merge_in_evaluation_mode_are_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), Merging(32, 32), Merging(32, 32), nn.Linear(32, 10))
    model[1].eval()
    model[3].eval()
    model[2].weight.data.fill_(-0.0)  # of which a round of merging makes other zeros
    weights, modes = copy.deepcopy(model.state_dict()), [each.training for each in model.modules()]
    SWITCHED.clear()
    plan(model, factorization="tt", budget=0.8, calibration=inputs(), exclude=["2", "3"])
    assert [each.training for each in model.modules()] == modes
    assert [model[2].merged, model[3].merged] == [False, True]
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    assert model[2].weight.signbit().equal(weights["2.weight"].signbit())
    last = dict(SWITCHED)  # what objects out of reach were told last
    assert [last[id(model[2])], last[id(model[3])]] == [True, False]
    model(inputs()).sum().backward()
    assert model[2].a.grad.count_nonzero() > 0


ODD = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "rows": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "complex": lambda: torch.ones(3, dtype=torch.complex128),
    "imaginary": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "nan": lambda: torch.tensor([torch.nan, 1]),
    "bfloat16": lambda: torch.ones(3).bfloat16(),
    "strided": lambda: torch.ones(6)[::2],
    "empty": lambda: torch.ones(0, 3),
}


@pytest.mark.parametrize("place", ["attribute", "buffer", "parameter"])
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
def test_tensors_of_any_kind_stay_what_they_were(kind, place):
    class Holds(Network):
        def between(self, y):
            self.odd.mul_(-2)
            return y

    model = Holds()
    if place == "buffer":
        model.register_buffer("odd", ODD[kind]())
    else:
        model.odd = ODD[kind]() if place == "attribute" else nn.Parameter(ODD[kind](), requires_grad=False)
    odd, before = model.odd, repr(ODD[kind]())
    plan(model, factorization="tt", ranks={"first": 4}, calibration=inputs())
    assert model.odd is odd
    assert repr(model.odd.data) == before
