"""Tensors of tltorch become factorizations, and back."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tenzoo import find_core_groups
from tenzoo.factorizations import CP, BlockTT, Factorization, TensorRing, TensorTrain, Tucker, factorization_class
from tenzoo.guests import from_tltorch, register_tltorch, to_tltorch
from tests.factorizations.formats import dense_oracle, small_cases

# tltorch sets TensorLy's backend for the whole process when it is imported: here that is while tests are collected.
_backend = tl.get_backend()
pytest.importorskip("opt_einsum", reason="tltorch needs opt_einsum; pip install 'tenzoo[tltorch]'")
tltorch = pytest.importorskip("tltorch", reason="an optional guest; pip install 'tenzoo[tltorch]'")
tl.set_backend(_backend)

CONVERTIBLE = ["btt", "cp", "tt", "tucker"]
CLASSES = {"btt": "BlockTT", "cp": "CPTensor", "tt": "TTTensor", "tucker": "TuckerTensor"}
SMALL = {"CP": ((3, 4, 2), 2), "Tucker": ((3, 4, 2), (2, 2, 2)), "TT": ((3, 4, 2), (1, 2, 2, 1))}


@pytest.fixture(autouse=True, scope="module")
def _tltorch_on_torch() -> Iterator[None]:
    tl.set_backend("pytorch")
    yield
    tl.set_backend(_backend)


def randomize_(module: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def new(kind: str, shape: tuple[Any, ...], rank: Any, *, tensorized: bool = False, dtype: Any = torch.float64) -> Any:
    maker = tltorch.TensorizedTensor if tensorized else tltorch.FactorizedTensor
    torch.manual_seed(0)
    return randomize_(maker.new(shape, rank=rank, factorization=kind, dtype=dtype))


def assert_converted(guest: Any, kind: type[Factorization]) -> Factorization:
    """The factorization of a guest, after checks of its values by three ways, and of its memory."""
    before = [part.clone() for part in guest.parameters()]
    made = from_tltorch(guest)
    assert type(made) is kind
    dense = guest.to_tensor().detach()
    assert made.shape == tuple(dense.shape)
    torch.testing.assert_close(made.reconstruct().detach(), dense)
    torch.testing.assert_close(dense_oracle(made.name, list(made.cores)).detach(), dense)
    assert made.reconstruct().dtype == dense.dtype
    with torch.no_grad():
        for core in made.cores:
            core.zero_()
    assert all(torch.equal(part, old) for part, old in zip(guest.parameters(), before, strict=True))
    return from_tltorch(guest)


# --- from tltorch -----------------------------------------------------------------------------------------------------


@st.composite
def guests(draw: st.DrawFn) -> tuple[Any, type[Factorization]]:
    """A tensor of tltorch with random numbers, and what it becomes."""
    name = draw(st.sampled_from(["CP", "Tucker", "TT", "BlockTT", "CPTensorized", "TuckerTensorized"]))
    tensorized = name in ("BlockTT", "CPTensorized", "TuckerTensorized")
    order = draw(st.integers(1, 3)) * 2 if tensorized else draw(st.integers(2, 4))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=order, max_size=order)))
    half = order // 2
    shape = (sizes[:half], sizes[half:]) if tensorized else sizes
    inner = st.lists(st.integers(1, 4), min_size=order, max_size=order)
    match name.removesuffix("Tensorized"):
        case "CP":
            kind, rank = CP, draw(st.integers(1, 4))
        case "Tucker":  # some of the ranks are larger than what the mode, or the others, can use
            kind, rank = Tucker, tuple(draw(inner))
        case "TT":
            kind, rank = TensorTrain, (1, *draw(inner)[: order - 1], 1)
        case "BlockTT":
            kind, rank = BlockTT, (1, *draw(inner)[: half - 1], 1)
    return new(name.removesuffix("Tensorized"), shape, rank, tensorized=tensorized), kind


@given(guests())
@settings(deadline=None, max_examples=120)
def test_a_guest_becomes_a_factorization_of_the_same_values(case: tuple[Any, type[Factorization]]):
    assert_converted(*case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["CP", "Tucker", "TT"])
def test_the_precision_is_kept(kind: str, dtype: torch.dtype):
    made = from_tltorch(new(kind, *SMALL[kind], dtype=dtype))
    assert {core.dtype for core in made.cores} == {dtype}


def test_weights_are_spread_evenly_with_their_sign_in_the_first_factor():
    factors = [torch.ones(size, 3, dtype=torch.float64) for size in (2, 3, 4)]
    made = from_tltorch(tltorch.CPTensor(torch.tensor([-8.0, 27.0, 0.0], dtype=torch.float64), factors))
    expected = [[-2.0, 3.0, 0.0], [2.0, 3.0, 1.0], [2.0, 3.0, 1.0]]
    for core, row in zip(made.cores, expected, strict=True):
        torch.testing.assert_close(core.detach(), torch.tensor(row, dtype=torch.float64).expand_as(core))


def test_a_component_of_weight_zero_can_still_be_trained():
    guest = new("CP", (3, 4, 2), 2)
    with torch.no_grad():
        guest.weights.zero_()
    made = from_tltorch(guest)
    made.reconstruct().sum().backward()
    assert made.cores[0].grad.abs().min() > 0


def test_cp_without_weights():
    factors = [torch.randn(size, 2) for size in (3, 4)]
    made = from_tltorch(tltorch.CPTensor(None, factors, (3, 4), 2))
    assert all(torch.equal(core, factor) for core, factor in zip(made.cores, factors, strict=True))


@pytest.mark.parametrize(
    ("shape", "rank", "admitted"),
    [((3, 4, 2), (5, 2, 2), (3, 2, 2)), ((9, 2, 2), (7, 2, 2), (4, 2, 2)), ((9, 2, 2), (9, 5, 6), (4, 2, 2))],
)
def test_ranks_of_tucker_are_brought_down_to_what_it_admits(shape: Any, rank: Any, admitted: Any):
    assert assert_converted(new("Tucker", shape, rank), Tucker).rank == admitted


def test_factors_that_were_inserted_stand_in_the_order_of_the_modes():
    guest = new("CP", (3, 4), 2).transduct(5, mode=1, new_factor=torch.randn(5, 2, dtype=torch.float64))
    assert assert_converted(guest, CP).shape == (3, 5, 4)


def test_cores_are_trainable_where_the_factors_are():
    guest = new("Tucker", (3, 4, 2), (2, 2, 2))
    guest.factors[1].requires_grad_(False)
    flags = [True, True, False, True]
    made = from_tltorch(guest)
    assert [core.requires_grad for core in made.cores] == flags
    assert [part.requires_grad for part in to_tltorch(made).parameters()] == flags
    constant = tltorch.CPTensor(nn.Parameter(torch.ones(2)), [torch.randn(3, 2), nn.Parameter(torch.randn(4, 2))])
    assert [core.requires_grad for core in from_tltorch(constant).cores] == [False, True]


def test_the_weight_of_a_layer_computes_what_the_layer_does():
    layer = randomize_(tltorch.FactorizedLinear((2, 3), (3, 4), factorization="BlockTT", rank=3, dtype=torch.float64))
    x = torch.randn(5, 6, dtype=torch.float64)
    dense = from_tltorch(layer.weight).reconstruct().reshape(12, 6)
    torch.testing.assert_close(x @ dense.t() + layer.bias, layer(x))


# --- to tltorch -------------------------------------------------------------------------------------------------------


@given(small_cases(CONVERTIBLE))
@settings(deadline=None, max_examples=120)
def test_there_and_back_changes_nothing(case: tuple[type[Factorization], tuple[int, ...], Any]):
    kind, shape, rank = case
    made = kind(shape, rank, dtype=torch.float64)
    guest = to_tltorch(made)
    assert type(guest).__name__ == CLASSES[made.name]
    torch.testing.assert_close(guest.to_tensor().detach(), made.reconstruct().detach())
    assert sum(part.numel() for part in guest.parameters()) == sum(core.numel() for core in made.cores)
    back = assert_converted(guest, kind)
    assert back.rank == made.rank
    assert all(torch.equal(one, two) for one, two in zip(back.cores, made.cores, strict=True))


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_shape_and_rank_are_what_tltorch_itself_would_say(name: str):
    ours = factorization_class(name)((2, 3, 3, 4), 2, dtype=torch.float64)
    guest = to_tltorch(ours)
    if name == "btt":
        own = new("BlockTT", ((2, 3), (3, 4)), (1, 2, 1), tensorized=True)
        assert guest.tensorized_shape == own.tensorized_shape
        torch.testing.assert_close(guest.to_matrix(), ours.reconstruct().reshape(6, 12))
    else:
        rank = {"cp": 2, "tt": (1, 2, 2, 2, 1), "tucker": (2, 2, 2, 2)}[name]
        own = new({"cp": "CP", "tt": "TT", "tucker": "Tucker"}[name], (2, 3, 3, 4), rank)
    own_rank = own.rank if name == "cp" else tuple(own.rank)
    assert (guest.shape, guest.rank, guest.order) == (own.shape, own_rank, own.order)
    assert guest.state_dict().keys() == own.state_dict().keys()
    guest.load_state_dict(own.state_dict())
    torch.testing.assert_close(guest.to_tensor(), own.to_tensor())


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_gradients_flow_on_both_sides(name: str):
    torch.manual_seed(0)
    ours = factorization_class(name)((2, 3, 3, 4), 2, dtype=torch.float64)
    guest = to_tltorch(ours)
    target = torch.randn(2, 3, 3, 4, dtype=torch.float64)

    def gradients(dense: Tensor, parameters: Any) -> Any:
        return torch.autograd.grad((dense - target).square().sum(), list(parameters))

    expected = gradients(ours.reconstruct(), ours.cores)
    torch.testing.assert_close(gradients(guest.to_tensor(), guest.parameters()), expected)
    back = from_tltorch(guest)
    torch.testing.assert_close(gradients(back.reconstruct(), back.cores), expected)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_a_converted_tensor_has_as_many_cores(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tenzoo.cores._registry", {})
    register_tltorch()
    ours = factorization_class(name)((2, 3, 3, 4), 2)
    (group,) = find_core_groups(to_tltorch(ours))
    assert [core.shape for core in group.cores] == [core.shape for core in ours.cores]


def test_a_guest_shares_no_memory_with_the_factorization():
    ours = CP((3, 4), 2)
    guest = to_tltorch(ours)
    before = guest.to_tensor().detach().clone()
    with torch.no_grad():
        ours.cores[0].zero_()
    assert torch.equal(guest.to_tensor(), before)


# --- refusals ---------------------------------------------------------------------------------------------------------

_VALID = r"^expected a real CPTensor, TuckerTensor, TTTensor or BlockTT of tltorch in `tensor`, got "


@pytest.mark.parametrize("kind", ["CP", "Tucker", "TT"])
def test_complex_tensors_are_refused(kind: str):
    guest = new(f"Complex{kind}", *SMALL[kind], dtype=torch.complex64)
    with pytest.raises(TypeError, match=rf"{_VALID}Complex{kind}Tensor of torch\.complex64$"):
        from_tltorch(guest)


def test_a_tensor_of_complex_numbers_is_refused_whatever_its_class():
    factors = [torch.randn(size, 2, dtype=torch.complex128) for size in (3, 4)]
    with pytest.raises(TypeError, match=rf"{_VALID}CPTensor of torch\.complex128$"):
        from_tltorch(tltorch.CPTensor(torch.ones(2), factors))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: new("Dense", (3, 4), None), "DenseTensor"),
        (lambda: new("Dense", ((3, 2), (2, 2)), None, tensorized=True), "DenseTensorized"),
        (lambda: tltorch.FactorizedLinear((2, 3), (3, 4), factorization="CP", rank=2), "FactorizedLinear"),
        (lambda: torch.randn(3, 4), "Tensor"),
        (lambda: CP((3, 4), 2), "CP"),
    ],
)
def test_what_is_no_factorized_tensor_is_refused(make: Any, kind: str):
    with pytest.raises(TypeError, match=rf"{_VALID}{kind}$"):
        from_tltorch(make())


@pytest.mark.parametrize("shape", [(5, (2, 3), (3, 4)), ((2, 3), 4), ((2, 3),)])
def test_a_block_tt_of_anything_but_a_matrix_is_refused(shape: Any):
    guest = new("BlockTT", shape, 2, tensorized=True)
    with pytest.raises(ValueError, match=r"^expected a matrix, tensorized_shape \(\(m_1, .* in `tensor`, got \("):
        from_tltorch(guest)


def test_factors_that_do_not_fit_are_refused():
    guest = tltorch.TTTensor([torch.randn(2, 3, 2), torch.randn(2, 4, 1)], (3, 4), (2, 2, 1))
    with pytest.raises(
        ValueError, match=r"^expected factors of shapes \[\(1, 3, 2\), .* for TensorTrain, got \[\(2, 3, "
    ):
        from_tltorch(guest)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"^expected at least two sizes, each >= 1, in `shape`, got \(5,\)$"):
        from_tltorch(new("CP", (5,), 2))


@pytest.mark.parametrize("make", [lambda: TensorRing((3, 4, 2), 2), lambda: nn.Linear(3, 4)])
def test_what_has_no_counterpart_in_tltorch_is_refused(make: Any):
    kind = type(make()).__name__
    pattern = f"^expected CP, Tucker, TensorTrain or BlockTT in `factorization`, got {kind}, for which tltorch has no"
    with pytest.raises(TypeError, match=pattern):
        to_tltorch(make())


@pytest.mark.parametrize("convert", [from_tltorch, to_tltorch])
def test_a_missing_library_is_named(convert: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tltorch", None)
    with pytest.raises(ImportError, match=r"got no tltorch; run pip install 'tenzoo\[tltorch\]'"):
        convert(CP((3, 4), 2))
