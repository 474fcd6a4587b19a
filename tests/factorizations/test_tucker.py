import pytest
import tensorly as tl
import torch

from tenzoo.factorizations import Tucker
from tenzoo.factorizations import tucker as tucker_module
from tenzoo.factorizations.decomposition import tensorly_on_torch
from tests.factorizations.formats import EntriesConformance, FactorizationConformance


class TestTucker(FactorizationConformance):
    name, shape, rank = "tucker", (3, 4, 2), [2, 3, 2]


class TestTuckerOfOrderFour(FactorizationConformance):
    name, shape, rank = "tucker", (2, 3, 2, 3), [2, 1, 2, 3]


class TestTuckerEntries(EntriesConformance):
    name, shape, rank = "tucker", (3, 4, 2), [2, 3, 2]


def test_reconstruct_is_that_of_tensorly():
    factorization = Tucker((5, 4, 3, 2), [2, 3, 3, 2], dtype=torch.float64)
    core, *factors = factorization.cores
    with tensorly_on_torch():
        expected = tl.tucker_to_tensor((core, factors))
    torch.testing.assert_close(factorization.reconstruct(), expected)


def test_ranks_are_clipped_to_the_shape():
    assert Tucker((9, 2, 3), 100).rank == (6, 2, 3)
    assert Tucker((9, 2, 3), [1, 5, 2]).rank == (1, 2, 2)
    assert Tucker.num_parameters((9, 2, 3), 100) == Tucker.num_parameters((9, 2, 3), [6, 2, 3])
    assert Tucker((2, 3), 1.0).rank == (1, 1)


def test_unusable_ranks_are_dropped_by_a_decomposition():
    assert Tucker.decompose(torch.randn(5, 5, 5), [5, 1, 1]).rank == (1, 1, 1)
    assert Tucker.decompose(torch.randn(5, 5, 5), [5, 2, 2]).rank == (4, 2, 2)


@pytest.mark.parametrize("rank", [[2, 2, 2], [3, 4, 2], [1, 1, 1]])
def test_error_is_at_most_that_of_the_truncated_unfoldings(rank):
    torch.manual_seed(0)
    tensor = torch.randn(5, 6, 4, dtype=torch.float64)
    bound = sum(
        torch.linalg.svdvals(tensor.movedim(k, 0).reshape(tensor.shape[k], -1))[r:].square().sum()
        for k, r in enumerate(rank)
    )
    error = (Tucker.decompose(tensor, rank).reconstruct() - tensor).square().sum()
    assert error <= bound * (1 + 1e-9)


def test_large_blocks_are_multiplied_by_transposition():
    """Beyond ``_SMALL_BATCH`` a mode product takes another way; Hypothesis draws smaller shapes only."""
    torch.manual_seed(0)
    weight = Tucker((30, 50, 20, 40), [20, 30, 10, 15], dtype=torch.float64)
    assert min(weight.rank[:3]) * 50 * 30 > tucker_module._SMALL_BATCH
    dense = torch.einsum("abcd,ia,jb,kc,ld->ijkl", *weight.cores)
    rebuilt = weight.reconstruct()
    torch.testing.assert_close(rebuilt, dense, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(dense)
    ours = torch.autograd.grad((rebuilt * direction).sum(), list(weight.cores))
    theirs = torch.autograd.grad((dense * direction).sum(), list(weight.cores))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-9)
