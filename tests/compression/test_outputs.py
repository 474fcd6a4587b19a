"""Outputs of any kind count in the errors of a plan and in the check of a compressed model, each by itself."""

import copy
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tenzoo.compression import apply_, plan
from tenzoo.compression.outputs import difference
from tenzoo.compression.runs import numbers_in

X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """Two layers; what is returned is made of their output."""

    def __init__(self, made=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.made = nn.Linear(64, 64), nn.Linear(64, 64), made

    def hidden(self, x):
        return self.b(torch.relu(self.a(x)))

    def forward(self, x):
        return self.made(self.hidden(x))


class Instances:
    __slots__ = ("boxes", "image")

    def __init__(self, boxes):
        self.boxes, self.image = boxes, "a name"


@dataclass
class Output:
    logits: object


FORMS = {
    "a tensor": lambda y: y,
    "a namespace": lambda y: SimpleNamespace(logits=y),
    "slots": Instances,
    "a dataclass": Output,
    "a distribution": lambda y: torch.distributions.Normal(y, torch.zeros(()).exp()),
    "an array": lambda y: y.numpy(),
    "numbers of Python": lambda y: y.tolist(),
    "complex": lambda y: torch.complex(y, torch.zeros_like(y)),
    "conjugate": lambda y: torch.complex(torch.zeros_like(y), y).conj(),
    "sparse": lambda y: y.to_sparse(),
    "nested": lambda y: torch.nested.nested_tensor([*y]),
    "deep": lambda y: ({"a": deque([(SimpleNamespace(b=[Output(y)]), None)])}, 3),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_outputs_of_any_kind_count(form):
    model = Base(FORMS[form])
    made = plan(model, factorization="tt", ranks=2, calibration=X)
    small = apply_(copy.deepcopy(model), made, calibration=X)
    held = X[-len(X) // 4 :] if made.held_back else X
    with torch.no_grad():
        y, found = model.hidden(held), small.hidden(held)
    assert made.output_error > 0.1
    if form != "a distribution":  # which has a scale beside
        assert made.output_error == pytest.approx(float((found - y).norm() / y.norm()), rel=1e-4)


def test_what_is_no_output():
    y = torch.ones(2)
    settings = SimpleNamespace(rate=3.0, module=nn.Linear(2, 2), kind=int, y=y)
    settings.itself = settings
    assert [x.tolist() for x in numbers_in([settings, 1.5, 2, True, "text", None, torch.arange(3), y])] == [
        [1.0, 1.0],
        1.5,
        [1.0, 1.0],
    ]


class Kept(Base):
    """Returns what it writes into memory that it keeps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("out", torch.zeros(32, 64), persistent=False)

    def forward(self, x):
        return self.out[: len(x)].copy_(self.hidden(x))


def test_outputs_in_memory_that_the_model_keeps():
    expected = plan(Base(), factorization="tt", ranks=2, calibration=X)
    assert plan(Kept(), factorization="tt", ranks=2, calibration=X).output_error == pytest.approx(expected.output_error)


class Chosen(Base):
    """Returns the rows whose score is above a threshold."""

    def __init__(self, rows):
        super().__init__()
        self.score = nn.Linear(64, 1)
        with torch.no_grad():
            self.threshold = float(self.score(self.hidden(X))[:, 0].sort().values[-rows - 1])

    def forward(self, x):
        y = self.hidden(x)
        return y[self.score(y)[:, 0] > self.threshold]


@pytest.mark.parametrize("settings", [{"ranks": {"b": 4}}, {"budget": 0.5}], ids=["ranks", "budget"])
@pytest.mark.parametrize("rows", [1, 12])
def test_outputs_of_other_shapes_are_refused(rows, settings):
    with pytest.raises(ValueError, match=r"same shapes with any weights, got \[\(\d+, 64\)\] and, with layers"):
        plan(Chosen(rows), factorization="tt", calibration=X, **settings)


def test_outputs_that_are_empty_are_refused():
    with pytest.raises(ValueError, match="returns floating-point tensors on `calibration`, got a Tensor of empty ones"):
        plan(Base(lambda y: y[:0]), factorization="tt", ranks=2, calibration=X)


class Inverse(Base):
    def forward(self, x):
        return 1 / self.hidden(x).relu().add(self.floor).sub(self.floor)


@pytest.mark.parametrize("settings", [{"ranks": 2}, {"budget": 0.5}], ids=["ranks", "budget"])
def test_an_output_that_becomes_infinite_is_no_small_error(settings, caplog):
    model = Base(lambda y: torch.where(y.abs() > 1.5 * LARGEST, torch.inf, y))
    made = plan(model, factorization="tt", calibration=100 * X, **settings)
    assert made.output_error is None or made.output_error < 2
    jumps = Base(lambda y: 1 / torch.where(y == EXACT[: len(y)], y, torch.zeros(())))  # infinite with any other weights
    made = plan(jumps, factorization="tt", calibration=X, **settings)
    assert made.output_error is None
    assert "not finite with these ranks" in caplog.text


with torch.no_grad():
    EXACT = Base().hidden(X)
    LARGEST = float(EXACT.abs().max())


class Asking(Base):
    """Is another network where a layer is made of cores."""

    def hidden(self, x):
        return super().hidden(x) * (1.0 if type(self.a) is nn.Linear else 0.5)


class Drawing(Asking):
    def __init__(self):
        super().__init__()
        self.noise = iter(torch.randn(64, 32, 64, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        return self.hidden(x) + 1e-3 * next(self.noise)


ASKING = {
    "draws by itself": Drawing,
    "returns an object": lambda: Asking(lambda y: SimpleNamespace(logits=y)),
    "returns something larger beside": lambda: Asking(lambda y: (y, 1e4 * torch.ones(len(y), 64))),
    "returns something smaller beside": lambda: Asking(lambda y: (y, 1e-9 * torch.ones(len(y), 64))),
}


@pytest.mark.parametrize("kind", ASKING)
def test_a_compressed_model_that_does_something_else_is_refused(kind):
    made = plan(ASKING[kind](), factorization="tt", ranks=16)
    with pytest.raises(ValueError, match="a model that does with cores what it does with the dense weights"):
        apply_(ASKING[kind](), made, example_input=X)


def test_an_output_of_nothing_but_rounding_is_no_difference():
    y = torch.randn(100)
    rounding = 1e-7 * torch.randn(100)
    assert difference([y, rounding], [y, -rounding]) < 1e-2
    assert difference([y, y], [y, -y]) == pytest.approx(2)
    assert difference([torch.tensor([1.0, torch.inf])], [torch.tensor([1.0, torch.inf])]) == 0
    assert difference([torch.tensor([1.0, torch.inf])], [torch.tensor([1.0, 2.0])]) == torch.inf
    assert difference([y], [y[:50]]) is None


def test_outputs_that_cannot_be_compared_are_told_of(caplog):
    model = Base(lambda y: y.argmax(-1))
    apply_(model, plan(model, factorization="tt", ranks=16), example_input=X)
    assert "outputs on `example_input` cannot be compared with those of the dense weights" in caplog.text


def test_an_array_is_copied():
    y = np.ones(2)
    (found,) = numbers_in(y)
    y += 1
    assert found.tolist() == [1, 1]
