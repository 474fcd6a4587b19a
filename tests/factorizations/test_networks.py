"""Any network of cores, drawn at random: trees, loops, hyperedges, cores without modes and with several."""

import copy
import io
import math
import pickle
from typing import final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenzoo.compression import plan
from tenzoo.factorizations import FACTORIZATIONS, Factorization, factorization_class
from tenzoo.factorizations.network import Network
from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedLinear
from tests.conformance import CoreProviderConformance
from tests.factorizations.formats import EntriesConformance, FactorizationConformance, full_index

MODES, BONDS = "abcd", "uvwxyz"


@st.composite
def equations(draw: st.DrawFn, least: int = 2) -> str:
    """An einsum of 2 to 4 cores that bonds connect; some have further bonds, or one more core at a bond."""
    modes = MODES[: draw(st.integers(least, 4))]
    number = draw(st.integers(2, 4))
    cores = [""] * number
    for core in range(1, number):  # a tree
        cores[core] += BONDS[core - 1]
        cores[draw(st.integers(0, core - 1))] += BONDS[core - 1]
    if draw(st.booleans()):  # a loop
        for core in draw(st.lists(st.integers(0, number - 1), min_size=2, max_size=2, unique=True)):
            cores[core] += BONDS[number - 1]
    if draw(st.booleans()):  # a hyperedge
        core = draw(st.integers(0, number - 1))
        cores[core] += BONDS[0] if BONDS[0] not in cores[core] else ""
    for mode in modes:
        cores[draw(st.integers(0, number - 1))] += mode
    return f"{','.join(''.join(draw(st.permutations(core))) for core in cores)}->{modes}"


def weight_of(equation: str, sizes: int = 3) -> Factorization:
    torch.manual_seed(0)
    shape = [2 + (k + sizes) % 3 for k in range(len(equation.partition("->")[2]))]
    return factorization_class(equation)(shape, 2, dtype=torch.float64)


def conforms(suite: type[CoreProviderConformance], **settings: object) -> None:
    """Run all tests of a conformance suite."""
    instance = type(suite.__name__, (suite,), settings)()
    for name in dir(instance):
        if name.startswith("test_"):
            torch.manual_seed(0)
            getattr(instance, name)(instance.make())


@settings(deadline=None, max_examples=30)
@given(equations())
def test_the_conformance_suite(equation):
    for suite in (FactorizationConformance, EntriesConformance):
        conforms(suite, name=equation, shape=weight_of(equation).shape, rank=2)


@settings(deadline=None, max_examples=60)
@given(equations())
def test_what_follows_from_the_legs(equation):
    weight = weight_of(equation)
    terms, modes = equation.split("->")[0].split(","), equation.split("->")[1]
    kind, order = type(weight), len(modes)
    assert [len(term) for term in terms] == [core.ndim for core in weight.cores]
    assert kind.num_parameters(weight.shape, 2) == sum(core.numel() for core in weight.cores)
    for mode, letter in enumerate(modes):
        core, dim = kind.core_of_mode(mode, order)
        assert terms[core][dim] == letter
        assert weight.cores[core].shape[dim] == weight.shape[mode]
    dense = torch.einsum(equation, *weight.cores)
    torch.testing.assert_close(weight.reconstruct(), dense)
    for copied in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert torch.equal(copied.reconstruct(), weight.reconstruct())
    # Each entry is a sum of so many products.
    with torch.no_grad():
        for core in weight.cores:
            core.fill_(1.0)
    sizes = kind.network(order).sizes(weight.shape, weight.rank)
    assert int(weight.reconstruct().flatten()[0]) == math.prod(sizes[bond] for bond in kind.network(order).bonds)


@settings(deadline=None, max_examples=40)
@given(equations())
def test_sparse_gradients_are_the_dense_ones(equation):
    weight = weight_of(equation)
    index = full_index(weight.shape)[::3].repeat(2, 1)
    dense = torch.autograd.grad(weight.entries(index).square().sum(), list(weight.cores))
    weight.entries(index, sparse_grad=True).square().sum().backward()
    for core, expected in zip(weight.cores, dense, strict=True):
        assert core.grad.is_sparse
        assert core.grad.is_coalesced()
        torch.testing.assert_close(core.grad.to_dense(), expected)
        parts = core.grad.indices(), core.grad.values()
        again = torch.sparse_coo_tensor(*parts, core.shape, check_invariants=True).coalesce()
        assert torch.equal(again.indices(), core.grad.indices())


@settings(deadline=None, max_examples=40)
@given(equations())
def test_a_decomposition_of_its_own_tensor(equation):
    weight = weight_of(equation)
    kind, tensor = type(weight), weight.reconstruct().detach()
    found = kind.decompose(tensor, weight.rank)
    error = float((found.reconstruct().detach() - tensor).norm() / tensor.norm())
    assert error < (1e-10 if kind.network(tensor.ndim).is_tree else 0.5)
    assert all(bool(core.isfinite().all()) for core in found.cores)
    squares = torch.stack([core.detach().square().sum() for core in found.cores])
    if len(kind.network(tensor.ndim).bonds):  # connected: balanced cores have the same norm
        torch.testing.assert_close(squares, squares.mean().expand_as(squares), rtol=0.05, atol=0)


@settings(deadline=None, max_examples=30)
@given(equations())
def test_errors_of_growing_ranks(equation):
    torch.manual_seed(0)
    kind = factorization_class(equation)
    order = len(equation.partition("->")[2])
    tensor = torch.randn([5, 4, 6, 3][:order], dtype=torch.float64)
    errors = kind.errors_by_rank(tensor)
    network = kind.network(order)
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    for rank, error in list(errors.items())[:: max(len(errors) // 3, 1)]:
        assert network.num_parameters(tensor.shape, rank) < tensor.numel()
        made = kind.decompose(tensor, rank).reconstruct().detach()
        actual = float((made - tensor).norm() / tensor.norm()) ** 2
        if network.is_tree:
            assert actual <= -math.log(max(1 - error, 1e-9)) + 1e-9
        else:
            assert actual <= 1.1 * error + 1e-3


# --- layers --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(equations())
def test_linear_layers_and_embeddings_contract_as_they_reconstruct(equation):
    torch.manual_seed(0)
    settings = {"factorization": equation, "rank": 2, "dtype": torch.float64}
    linear = TensorizedLinear(12, 8, **settings)
    table = TensorizedEmbedding(11, 6, padding_idx=5, **settings)
    for layer, x in ((linear, torch.randn(3, 2, 12).double()), (table, torch.tensor([[0, 10], [5, 3]]))):
        outputs = {}
        for layer.implementation in ("reconstruct", "contract"):
            outputs[layer.implementation] = layer(x)
        torch.testing.assert_close(outputs["contract"], outputs["reconstruct"])
        torch.testing.assert_close(outputs["contract"], layer.to_dense()(x))
        assert layer(x[:0]).shape == (0, *outputs["contract"].shape[1:])


@settings(deadline=None, max_examples=40)
@given(equations(3), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_convolutions_contract_as_they_reconstruct(equation, groups, stride):
    torch.manual_seed(0)
    settings = {"groups": groups, "stride": stride, "factorization": equation, "rank": 2, "dtype": torch.float64}
    layer = TensorizedConv2d(6, 4, (3, 2), padding=1, **settings)
    check_convolution(layer, torch.randn(2, 6, 5, 4).double())


@settings(deadline=None, max_examples=20)
@given(equations(), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_convolutions_of_a_pixel_contract_as_they_reconstruct(equation, groups, stride):
    torch.manual_seed(0)
    settings = {"groups": groups, "stride": stride, "factorization": equation, "rank": 2, "dtype": torch.float64}
    layer = TensorizedConv2d(6, 4, 1, padding=1, **settings)
    check_convolution(layer, torch.randn(2, 6, 5, 4).double())


def check_convolution(layer: TensorizedConv2d, x: Tensor) -> None:
    outputs = {}
    for layer.implementation in ("reconstruct", "contract"):
        outputs[layer.implementation] = layer(x)
    torch.testing.assert_close(outputs["contract"], outputs["reconstruct"])
    torch.testing.assert_close(outputs["contract"], layer.to_dense()(x))
    assert outputs["contract"].is_contiguous()
    assert layer(x[:0]).shape == (0, *outputs["contract"].shape[1:])


# --- the definition of a format ------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    known = dict(FACTORIZATIONS)
    yield FACTORIZATIONS
    FACTORIZATIONS.clear()
    FACTORIZATIONS.update(known)


def test_a_ring_with_one_rank_is_legs_and_sizes_of_bonds(registry):
    @final
    class UniformRing(Factorization):
        name = "uniform ring"

        @staticmethod
        def legs(order):
            return [(str(k), k, str((k + 1) % order)) for k in range(order)]

        @staticmethod
        def bond_sizes(rank, order):
            return {str(k): rank[0] for k in range(order)}

    assert registry["uniform ring"] is UniformRing
    torch.manual_seed(0)
    weight = factorization_class("uniform ring")((3, 4, 5), 2, dtype=torch.float64)
    assert weight.rank == (2,)
    torch.testing.assert_close(weight.reconstruct(), torch.einsum("aib,bjc,cka->ijk", *weight.cores))
    tensor = weight.reconstruct().detach()
    assert (UniformRing.decompose(tensor, 2).reconstruct() - tensor).norm() < 0.5 * tensor.norm()
    assert TensorizedLinear(8, 8, factorization="uniform ring", rank=3)(torch.ones(2, 8)).shape == (2, 8)
    with pytest.raises(ValueError, match=r"expected a new name in `name` of Other, got 'uniform ring', which is taken"):

        class Other(UniformRing):
            name = "uniform ring"


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("ar,br,cr->ab", "bond 'c' in one core"),
        ("ar,ar->a", "1 mode"),
        ("ar,abr->ab", "mode 'a' in 2 cores"),
        ("ar,br->abc", "mode 'c' in 0 cores"),
        ("aar,br->ab", "'a' 2 times in 'aar'"),
        ("ar,br->aab", "'a' 2 times in 'aab'"),
        ("ar,,br->ab", "letters, commas and one arrow"),
        ("ar,br", "letters, commas and one arrow"),
        ("ar->br->ab", "letters, commas and one arrow"),
        ("a1,b1->ab", "letters, commas and one arrow"),
        ("...r,br->ab", "letters, commas and one arrow"),
    ],
)
def test_wrong_equations_name_the_letter(equation, message):
    with pytest.raises(ValueError, match=message) as raised:
        factorization_class(equation)
    assert "`factorization`" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_spaces_in_an_equation_do_not_matter():
    assert factorization_class(" ar, br -> ab ") is factorization_class("ar,br->ab")


def test_an_order_that_does_not_fit():
    with pytest.raises(ValueError, match=r"the 3 modes a, b, c of 'ar,br,cr->abc' in `shape`, got 2"):
        factorization_class("ar,br,cr->abc")((4, 5), 2)
    with pytest.raises(ValueError, match=r"the 3 modes a, b, c of 'ar,br,cr->abc' in `shape`, got 4"):
        TensorizedLinear(8, 8, factorization="ar,br,cr->abc", rank=2, tensorization=[[4, 2], [4, 2]])


@pytest.mark.parametrize(
    ("legs", "message"),
    [
        ([(0, "r"), ("r",)], "one core with mode 1 in `legs`, got none"),
        ([(0, "r"), ("r", 1), (1,)], "one core with mode 1 in `legs`, got 2"),
        ([(0, "r"), ("r", 1, 2)], "modes from 0 to 1 in `legs`, got 2"),
        ([(0, "r"), ("r", "r", 1)], "a leg once in a core in `legs`, got 'r' twice in core 1"),
        ([(0, "r"), (1,)], "two cores or more with the bond 'r' in `legs`, got one"),
        ([(0, 1), ()], "one leg or more for each core"),
    ],
)
def test_wrong_legs(legs, message):
    with pytest.raises(ValueError, match=message):
        Network(legs, 2, lambda rank, order: dict.fromkeys("r", *rank[:1]) if rank else {})


def test_a_saved_factorization_of_an_equation_is_read_in_another_process_state():
    weight = weight_of("ar,brs,cs->abc")
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).reconstruct(), weight.reconstruct())


@pytest.mark.parametrize("equation", ["ab->ab", "ab->ba", "acr,bdr->abcd", "ac,bd->abcd", "a,b->ab", "abr,cr->acb"])
@pytest.mark.parametrize("sizes", [(6, 8), (7, 5), (64, 64)])
def test_formats_of_one_order_serve_linear_layers(equation, sizes):
    layer = TensorizedLinear(*sizes, factorization=equation, rank=2, dtype=torch.float64)
    x = torch.randn(3, sizes[0], dtype=torch.float64)
    outputs = {}
    for layer.implementation in ("reconstruct", "contract"):
        outputs[layer.implementation] = layer(x)
    torch.testing.assert_close(outputs["contract"], outputs["reconstruct"])


def test_a_layer_says_which_format_it_needs():
    with pytest.raises(ValueError, match=r"a format with tensors of 5 modes in `factorization`, got 'or,ir->oi'"):
        TensorizedConv2d(8, 8, 3, factorization="or,ir->oi", rank=2, tensorization=[[4, 2], [4, 2]])


def test_a_plan_leaves_layers_dense_that_have_no_tensor_of_the_format():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Flatten(), torch.nn.Linear(64, 32))
    made = plan(model, factorization="or,ir->oi", budget=0.8)
    assert [layer.reason for layer in made.layers] == ["has no tensor of the format or,ir->oi", None]


@pytest.mark.parametrize("factorization", ["o,i,p->oip", "ht", "btd", "or,pr,ir->opi"])
def test_outputs_have_the_precision_of_an_autocast(factorization):
    layer = TensorizedConv2d(6, 4, 3, groups=2, factorization=factorization, rank=2, implementation="contract")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 6, 8, 8)).dtype == torch.bfloat16


def test_a_format_is_found_by_its_path(tmp_path, monkeypatch, registry):
    (tmp_path / "own_formats.py").write_text(
        "from tenzoo.factorizations import Factorization\n"
        "class Pair(Factorization):\n"
        "    name = 'pair'\n"
        "    @staticmethod\n"
        "    def legs(order):\n"
        "        return [(0, 'r'), ('r', *range(1, order))]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    weight = factorization_class("own_formats.Pair")((3, 4, 5), 2)
    assert weight.name == "pair"
    assert factorization_class("pair") is type(weight)
    for wrong in ("own_formats.Other", "no_such_module.Pair", "os.path"):
        with pytest.raises(
            ValueError,
            match=f"path of a subclass of Factorization with a `name` of its own in `factorization`, got '{wrong}'",
        ):
            factorization_class(wrong)


def test_a_class_without_a_name_of_its_own_is_refused(tmp_path, monkeypatch, registry):
    (tmp_path / "heirs.py").write_text(
        "from tenzoo.factorizations import Factorization\n"
        "class Star(Factorization):\n"
        "    name = 'star'\n"
        "    @staticmethod\n"
        "    def legs(order):\n"
        "        return [(mode, 'r') for mode in range(order)]\n"
        "class Heir(Star):\n"
        "    @staticmethod\n"
        "    def legs(order):\n"
        "        return [(str(mode), mode, str((mode + 1) % order)) for mode in range(order)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("heirs.Heir", "tenzoo.factorizations.Factorization"):
        with pytest.raises(ValueError, match=f"with a `name` of its own in `factorization`, got '{path}'"):
            plan(torch.nn.Sequential(torch.nn.Linear(64, 64)), factorization=path, budget=0.5)


def wrong_integer(order):
    return [(int("oops"), "r")]


def hanging(order):
    return [(mode, f"r{mode}") for mode in range(order)]


def wrong_sizes(rank, order):
    return {"r": rank[5]}


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ({"legs": wrong_integer}, ValueError, "invalid literal for int"),
        ({"legs": hanging}, ValueError, r"expected two cores or more with the bond 'r0' in `legs`, got one"),
        ({"bond_sizes": wrong_sizes}, IndexError, "tuple index out of range"),
    ],
)
def test_an_error_in_a_format_is_not_taken_for_an_order_that_it_has_not(parts, kind, message, registry):
    legs = {"legs": lambda order: [(mode, "r") for mode in range(order)]}
    type("Wrong", (Factorization,), {"name": "wrong", **{k: staticmethod(f) for k, f in {**legs, **parts}.items()}})
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(kind, match=message):
        plan(model, factorization="wrong", ranks=2)
    with pytest.raises(kind, match=message):
        TensorizedLinear(64, 64, factorization="wrong", rank=2)


@pytest.mark.parametrize("name", ["", "auto", "a,b->c", "a.b"])
def test_names_that_mean_something_else_are_refused(name, registry):
    with pytest.raises(ValueError, match=r"in `name` of Named, got"):
        type("Named", (Factorization,), {"name": name})


@pytest.mark.parametrize("factorization", [["or", "ir"], {"0": "cp"}, None, 3])
def test_a_factorization_is_a_name(factorization):
    with pytest.raises(TypeError, match="the name of a format or an einsum in `factorization`, got"):
        TensorizedLinear(6, 8, factorization=factorization, rank=2)
