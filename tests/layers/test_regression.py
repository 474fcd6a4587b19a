"""Linear maps of tensors: against one einsum of the input with the cores, and against tltorch's layers."""

import copy
import math
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tenzoo import find_core_groups
from tenzoo.guests import from_tltorch
from tenzoo.layers import TensorContraction, TensorRegression
from tests.conformance import CoreProviderConformance
from tests.factorizations.formats import NAMES, dense_oracle
from tests.factorizations.test_networks import conforms, equations

# tltorch sets TensorLy's backend for the whole process when it is imported: here that is while tests are collected.
_backend = tl.get_backend()
pytest.importorskip("opt_einsum", reason="tltorch needs opt_einsum; pip install 'tenzoo[tltorch]'")
tltorch = pytest.importorskip("tltorch", reason="an optional guest; pip install 'tenzoo[tltorch]'")
tl.set_backend(_backend)

WAYS = ["reconstruct", "contract"]


@pytest.fixture
def _tltorch_on_torch() -> Iterator[None]:
    tl.set_backend("pytorch")
    yield
    tl.set_backend(_backend)


def rows_of(shape: tuple[int, ...], number: int = 3) -> Tensor:
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def inner(x: Tensor, weight: Tensor, order: int) -> Tensor:
    """``⟨X, W⟩`` over the last modes of W."""
    return torch.tensordot(x, weight, ([*range(1, x.ndim)], [*range(weight.ndim - order, weight.ndim)]))


class RegressionConformance(CoreProviderConformance):
    name: ClassVar[str]
    implementation: ClassVar[Any]
    shapes: ClassVar[tuple[tuple[int, ...], tuple[int, ...]]] = ((3, 4), (2, 3))
    non_core = frozenset({"bias"})

    def make(self) -> nn.Module:
        arguments = {"factorization": self.name, "rank": 2, "implementation": self.implementation}
        return TensorRegression(*self.shapes, dtype=torch.float64, **arguments)

    def output(self, provider: nn.Module) -> Tensor:
        return provider(rows_of(self.shapes[0]))

    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        cores = [value for name, value in parameters.items() if name.startswith("factorization.")]
        weight = dense_oracle(self.name, cores)
        return inner(rows_of(self.shapes[0]), weight, len(self.shapes[0])) + parameters["bias"]


class ContractionConformance(CoreProviderConformance):
    implementation: ClassVar[Any]
    sizes: ClassVar[tuple[tuple[int, ...], Any]]
    non_core = frozenset({"bias"})

    def make(self) -> nn.Module:
        return TensorContraction(*self.sizes, bias=True, dtype=torch.float64, implementation=self.implementation)

    def output(self, provider: nn.Module) -> Tensor:
        return provider(rows_of(self.sizes[0]))

    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        y = rows_of(self.sizes[0])
        for mode in range(len(self.sizes[0])):  # one mode after the other
            factor = parameters[f"factorization.cores.{mode}"]
            y = (y.movedim(mode + 1, -1) @ factor.t()).movedim(-1, mode + 1)
        return y + parameters["bias"]


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_the_conformance_suite(name, implementation):
    conforms(RegressionConformance, name=name, implementation=implementation)


@settings(deadline=None, max_examples=20)
@given(equations(), st.data())
def test_the_conformance_suite_of_any_network(equation, data):
    order = len(equation.partition("->")[2])
    sizes, split = (2, 3, 4, 2)[:order], data.draw(st.integers(1, order - 1))
    for implementation in WAYS:
        shapes = sizes[split:], sizes[:split]
        conforms(RegressionConformance, name=equation, implementation=implementation, shapes=shapes)


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("sizes", [((3, 4, 2), [2, 5, 1]), ((5,), 3), ((2, 3, 2, 3), 2)])
def test_the_conformance_suite_of_contractions(sizes, implementation):
    conforms(ContractionConformance, sizes=sizes, implementation=implementation)


# --- the same numbers in tltorch --------------------------------------------------------------------------------------

EQUATIONS = {"cp": "bz,cz,az->abc", "tucker": "xyz,bx,cy,az->abc", "tt": "xby,ycz,zaw,wx->abc"}
"""tltorch's networks, whose modes are those of the input first; a train with a core that closes its ends."""


@pytest.mark.usefixtures("_tltorch_on_torch")
@pytest.mark.parametrize(("name", "rank"), [("cp", 3), ("tucker", (2, 3, 4)), ("tt", (1, 3, 2, 1))])
def test_a_regression_is_that_of_tltorch(name, rank):
    torch.manual_seed(0)
    guest = tltorch.TRL((3, 4), (5,), bias=True, factorization=name, rank=rank, dtype=torch.float64)
    guest.init_from_random()
    cores = list(from_tltorch(guest.weight).cores)
    if name == "tt":
        cores.append(torch.ones(1, 1))
    sizes: dict[str, int] = {}
    for term, core in zip(EQUATIONS[name].partition("->")[0].split(","), cores, strict=True):
        sizes.update(zip(term, core.shape, strict=True))
    bonds = dict.fromkeys(letter for letter in EQUATIONS[name] if letter in "xyzw")
    layer = TensorRegression(
        (3, 4), (5,), factorization=EQUATIONS[name], rank=[sizes[bond] for bond in bonds], dtype=torch.float64
    )
    with torch.no_grad():
        for own, core in zip(layer.factorization.cores, cores, strict=True):
            own.copy_(core)
        layer.bias.copy_(guest.bias)
    x = rows_of((3, 4))
    for layer.implementation in WAYS:
        torch.testing.assert_close(layer(x), guest(x))


@pytest.mark.usefixtures("_tltorch_on_torch")
def test_a_contraction_is_that_of_tltorch():
    torch.manual_seed(0)
    layer = TensorContraction((3, 4, 2), rank=[2, 3, 5], dtype=torch.float64)
    guest = tltorch.TCL((3, 4, 2), rank=[2, 3, 5], dtype=torch.float64)
    with torch.no_grad():
        for factor, core in zip(guest.factors, layer.factorization.cores, strict=True):
            factor.copy_(core)
    x = rows_of((3, 4, 2))
    for layer.implementation in WAYS:
        torch.testing.assert_close(layer(x), guest(x))


# --- initialization ---------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [*NAMES, "contraction", "az,bzy,yxd,zx->abd"])
def test_the_outputs_have_kaimings_variance(name):
    """``E[Y²] = 2 ‖X‖² / I`` for each entry of the output, and each input."""
    torch.manual_seed(0)
    if name == "contraction":
        layer = TensorContraction((4, 5), 3, dtype=torch.float64)
    elif "," in name:
        layer = TensorRegression((4, 5), (6,), False, factorization=name, rank=3, dtype=torch.float64)
    else:
        layer = TensorRegression((4, 5), (2, 3), False, factorization=name, rank=3, dtype=torch.float64)
    x = rows_of((4, 5), 1)
    squares = []
    for _ in range(3000):
        layer.reset_parameters()
        squares.append(layer(x).detach().square().mean())
    mean, error = torch.stack(squares).mean(), torch.stack(squares).std() / math.sqrt(len(squares))
    assert abs(mean - 2 * x.square().mean()) < 4 * error
    assert error < 0.2 * mean


def test_a_bias_is_that_of_a_linear_layer():
    layer = TensorRegression((20, 5), (6, 100), factorization="cp", rank=1)
    assert 0.08 < layer.bias.abs().max() <= 0.1
    assert TensorRegression((4, 5), (6,), bias=False, factorization="cp", rank=1).bias is None
    assert TensorContraction((4, 5), 2).bias is None


# --- use --------------------------------------------------------------------------------------------------------------

MAKERS = {
    "regression": lambda **kwargs: TensorRegression((3, 4), (2, 5), factorization="tucker", rank=2, **kwargs),
    "ring": lambda **kwargs: TensorRegression((3, 4), (5,), factorization="az,bz,cz->abc", rank=2, **kwargs),
    "contraction": lambda **kwargs: TensorContraction((3, 4), [2, 3], bias=True, **kwargs),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("implementation", ["auto", *WAYS])
@pytest.mark.parametrize("kind", MAKERS)
def test_compiles_and_exports_for_any_batch(kind, implementation):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, x = MAKERS[kind](implementation=implementation), rows_of((3, 4)).float()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(grads, [parameter.grad for parameter in layer.parameters()])
    batch = torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=({0: batch},))
    many = torch.cat([x] * 50)
    torch.testing.assert_close(program.module()(many), layer(many))


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MAKERS)
def test_half_precision_and_autocast(kind, dtype, implementation):
    torch.manual_seed(0)
    layer, x = MAKERS[kind](implementation=implementation), rows_of((3, 4)).float()
    expected = layer(x)
    half = copy.deepcopy(layer).to(dtype)
    assert half(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(half(x.to(dtype)).float(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    y.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("kind", MAKERS)
def test_any_batch_and_its_weight(kind):
    torch.manual_seed(0)
    layer = MAKERS[kind](dtype=torch.float64)
    assert [group.name for group in find_core_groups(layer)] == ["weight"]
    assert layer.weight.shape == layer.factorization.shape
    x = rows_of((3, 4), 6)
    for layer.implementation in WAYS:
        y = layer(x)
        torch.testing.assert_close(layer(x[0]), y[0])
        torch.testing.assert_close(layer(x.view(2, 3, 3, 4)), y.view(2, 3, *y.shape[1:]))
        assert layer(x[:0]).shape == (0, *y.shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), y)  # with a kept weight
            torch.testing.assert_close(layer(x), y)
        layer.train()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    with pytest.raises(ValueError, match=r"expected shape \(…, 3, 4\) in `x`, got \(6, 4, 3\)"):
        layer(x.transpose(1, 2))


def test_a_large_weight_is_not_reconstructed_for_a_few_rows():
    layer = TensorRegression((64, 16, 16), (100,), factorization="tucker", rank=4)
    wide = TensorContraction((64, 32, 32), 8)
    for each in (layer, wide):
        few, many = (each.positions(torch.empty(rows, *each.input_shape, device="meta")) for rows in (4, 4096))
        assert (few.outputs, many.outputs) == (4, 4096)
        assert each.choose(few, "training") == "contract"
        contract, dense = (
            each.costs.contract.growth(many).multiplications,
            each.costs.dense.growth(many).multiplications,
        )
        assert contract < 0.2 * dense


def test_what_is_printed():
    assert str(MAKERS["regression"]()).startswith("TensorRegression(\n  (3, 4), (2, 5), bias=True, implementation=auto")
    assert str(TensorContraction((3, 4), 2)).startswith(
        "TensorContraction(\n  (3, 4), rank=(2, 2), bias=False, implementation=auto"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorContraction((3, 0), 2), "`input_shape`, got 0"),
        (lambda: TensorContraction((3, 4), [2]), "2 ints in `rank`, one for each mode of the input, got 1"),
        (lambda: TensorContraction((3, 4), 0.5), "`rank`, got 0.5"),
        (lambda: TensorContraction(12, 2), "sequence of ints in `input_shape`, got 12"),
        (lambda: TensorContraction((), 2), "one size or more in `input_shape`"),
        (lambda: TensorContraction((3, 4), 2, implementation="fast"), "`implementation`, got 'fast'"),
        (lambda: TensorRegression((3,), (), factorization="cp", rank=1), "one size or more in `output_shape`"),
        (lambda: TensorRegression((3, "4"), (2,), factorization="cp", rank=1), "`input_shape`, got '4'"),
        (lambda: TensorRegression((3, 4), (2,), factorization="az,bz->ab", rank=1), "modes a, b of .*got 3 modes"),
        (lambda: TensorRegression((3, 4), (2,), factorization="cpd", rank=1), "`factorization`, got 'cpd'"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_many_modes():
    layer = TensorContraction((2,) * 10, 1)
    assert layer(torch.ones(3, *(2,) * 10)).shape == (3, *(1,) * 10)
    with pytest.raises(ValueError, match="26 sizes or fewer in `input_shape`, got 27"):
        TensorContraction((1,) * 27, 1)
