import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune

from tenzoo.cores import find_core_groups
from tenzoo.factorizations import CP, FACTORIZATIONS, BlockTT, Factorization, Tucker, factorization_class
from tests.factorizations.formats import NAMES, dense_oracle, full_index, small_cases

FLOAT64 = {"dtype": torch.float64}


@pytest.fixture(params=NAMES)
def factorization(request: pytest.FixtureRequest) -> Factorization:
    torch.manual_seed(0)
    return FACTORIZATIONS[request.param]((3, 4, 2, 5), 2, **FLOAT64)


@settings(deadline=None, max_examples=120)
@given(case=small_cases(), seed=st.integers(0, 100))
def test_reconstruct_and_entries_equal_the_einsum(case, seed):
    cls, shape, rank = case
    torch.manual_seed(seed)
    factorization = cls(shape, rank, **FLOAT64)
    dense = dense_oracle(cls.name, list(factorization.cores))
    assert factorization.reconstruct().shape == dense.shape == shape
    torch.testing.assert_close(factorization.reconstruct(), dense)
    torch.testing.assert_close(factorization(), dense)
    index = full_index(shape)[torch.randperm(dense.numel())]
    torch.testing.assert_close(factorization.entries(index), dense[index.unbind(1)])
    torch.testing.assert_close(factorization.entries(index.int(), sparse_grad=True), dense[index.unbind(1)])


@settings(deadline=None, max_examples=100)
@given(case=small_cases(), fraction=st.floats(0.01, 1.0))
def test_num_parameters_is_that_of_an_instance(case, fraction):
    cls, shape, rank = case
    made = cls(shape, rank)
    assert cls.num_parameters(shape, rank) == sum(core.numel() for core in made.parameters())
    assert made.rank == cls(shape, made.rank).rank
    budget, slack = fraction * math.prod(shape), 1e-12
    if cls.num_parameters(shape, 1) > budget * (1 + slack):
        with pytest.raises(ValueError, match="rank one"):
            cls(shape, fraction)
    elif cls.num_parameters(shape, 1) < budget * (1 - slack):
        made = cls(shape, fraction)
        count = sum(core.numel() for core in made.parameters())
        assert count == cls.num_parameters(shape, fraction) <= budget * (1 + slack)
        larger = cls.num_parameters(shape, max(made.rank, default=1) + 1)
        assert larger > budget * (1 - slack) or larger == count


class Same(nn.Module):
    def forward(self, x):
        return x


def replace_core(cores):
    cores[0] = nn.Parameter(cores[0].detach().clone())


def parametrize_and_back(cores):
    parametrize.register_parametrization(cores, "0", Same())
    parametrize.remove_parametrizations(cores, "0")


def prune_for_good(cores):
    prune.l1_unstructured(cores, "0", amount=2)
    prune.remove(cores, "0")


@pytest.mark.parametrize("change", [replace_core, parametrize_and_back, prune_for_good])
def test_cores_keep_their_order_when_one_is_replaced(factorization, change):
    change(factorization.cores)
    cores = [factorization.cores[k] for k in range(len(factorization.cores))]
    assert list(factorization.cores) == cores
    torch.testing.assert_close(factorization.reconstruct(), dense_oracle(factorization.name, cores))


def test_a_pruned_core_follows_its_parameter(factorization):
    prune.l1_unstructured(factorization.cores, "0", amount=2)
    for _ in range(2):
        factorization.reconstruct().sum().backward()
        with torch.no_grad():
            factorization.cores.get_parameter("0_orig").add_(1)
        cores = [factorization.cores[k] for k in range(1, len(factorization.cores))]
        pruned = factorization.cores.get_parameter("0_orig") * factorization.cores.get_buffer("0_mask")
        assert (pruned == 0).sum() == 2
        torch.testing.assert_close(factorization.reconstruct(), dense_oracle(factorization.name, [pruned, *cores]))


def test_one_group_with_all_cores(factorization):
    (group,) = find_core_groups(torch.nn.ModuleDict({"weight": factorization}))
    assert group.name == "weight"
    assert list(group.cores) == list(factorization.parameters())


def test_reset_parameters_draws_anew_and_follows_the_seed(factorization):
    torch.manual_seed(3)
    factorization.reset_parameters()
    first = factorization.reconstruct()
    factorization.reset_parameters()
    assert not torch.equal(first, factorization.reconstruct())
    torch.manual_seed(3)
    factorization.reset_parameters()
    assert torch.equal(first, factorization.reconstruct())


def test_copies_are_independent_and_keep_dtype(factorization):
    twin = copy.deepcopy(factorization).float()
    assert twin.reconstruct().dtype == torch.float32
    assert factorization.reconstruct().dtype == torch.float64
    torch.testing.assert_close(twin.reconstruct().double(), factorization.reconstruct(), rtol=1e-4, atol=1e-4)


def test_repr_says_what_it_is(factorization):
    assert f"shape=(3, 4, 2, 5), rank={factorization.rank}" in repr(factorization)
    assert "of 120" in repr(factorization)


def test_empty_batch_of_entries(factorization):
    index = torch.empty(0, 4, dtype=torch.int64)
    for sparse_grad in (False, True):
        values = factorization.entries(index, sparse_grad=sparse_grad)
        assert values.shape == (0,)
        values.sum().backward()


def test_entries_out_of_range_raise(factorization):
    for column, size in enumerate(factorization.shape):
        for position in (size, -1):
            index = torch.zeros(2, 4, dtype=torch.int64)
            index[1, column] = position
            line = rf"expected 0 to {size - 1} in column {column} .*\(mode {column} of size {size}\), got {position};"
            for sparse_grad in (False, True):
                with pytest.raises(IndexError, match=line) as caught:
                    factorization.entries(index, sparse_grad=sparse_grad)
                assert "\n" not in str(caught.value)
            with pytest.raises(IndexError, match=line):
                factorization.entries(index.int().repeat(9, 1))


def test_another_error_in_entries_stays_itself(factorization, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("not of the index")

    monkeypatch.setattr(type(factorization), "entries_at", broken)
    with pytest.raises(RuntimeError, match="not of the index"):
        factorization.entries(torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("index", "error", "match"),
    [
        ([[0, 0, 0, 0]], TypeError, "got list"),
        (torch.zeros(1, 4), TypeError, "got torch.float32"),
        (torch.zeros(1, 4, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.zeros(1, 4, dtype=torch.uint8), TypeError, "got torch.uint8"),
        (torch.zeros(1, 3, dtype=torch.int64), ValueError, r"expected shape \(n, 4\) in `index`, got \(1, 3\)"),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"got \(4,\)"),
    ],
)
def test_wrong_index(factorization, index, error, match):
    with pytest.raises(error, match=match):
        factorization.entries(index)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_construction(name):
    cls = FACTORIZATIONS[name]
    with pytest.raises(TypeError, match="floating-point type in `dtype`"):
        cls((4, 4), 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="`init_std`"):
        cls((4, 4), 1, init_std=0.0)
    with pytest.raises(ValueError, match="`shape`"):
        cls((4,), 1)


def test_base_class_is_abstract_and_formats_are_final():
    with pytest.raises(TypeError, match="abstract"):
        Factorization((2, 2), 1)
    assert all(cls.__final__ for cls in FACTORIZATIONS.values())


def test_factorization_class():
    assert factorization_class("cp") is CP
    with pytest.raises(
        ValueError, match=r"one of \['btd', 'btt', 'cp', .* or an einsum such as .* in `factorization`, got 'TT'"
    ):
        factorization_class("TT")


def test_meta_device():
    factorization = Tucker((4, 5, 6), 2, device="meta")
    assert factorization.reconstruct().is_meta
    assert factorization.reconstruct().shape == (4, 5, 6)


def test_long_chains_do_not_overflow():
    factorization = FACTORIZATIONS["tr"]((2,) * 300, 50, **FLOAT64)
    values = factorization.entries(torch.zeros(1, 300, dtype=torch.int64))
    assert torch.isfinite(values).all()


def test_second_derivatives_of_entries():
    factorization = BlockTT((2, 3, 2, 2), 2, **FLOAT64)
    index = full_index((2, 3, 2, 2))
    assert torch.autograd.gradgradcheck(lambda *_: factorization.entries(index), tuple(factorization.parameters()))


def test_reconstruct_exports_as_a_graph_without_breaks(factorization):
    exported = torch.export.export(factorization, ())
    torch.testing.assert_close(exported.module()(), factorization.reconstruct())
