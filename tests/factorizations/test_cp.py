import pytest
import tensorly as tl
import torch

from tenzoo.factorizations import CP
from tenzoo.factorizations.decomposition import tensorly_on_torch
from tests.factorizations.formats import EntriesConformance, FactorizationConformance


class TestCP(FactorizationConformance):
    name, shape, rank = "cp", (3, 4, 2), 3


class TestCPMatrix(FactorizationConformance):
    name, shape, rank = "cp", (3, 4), 2


class TestCPEntries(EntriesConformance):
    name, shape, rank = "cp", (3, 4, 2), 3


def test_reconstruct_is_that_of_tensorly():
    factorization = CP((5, 4, 3, 2), 6, dtype=torch.float64)
    with tensorly_on_torch():
        expected = tl.cp_to_tensor((None, list(factorization.cores)))
    torch.testing.assert_close(factorization.reconstruct(), expected)


def test_rank_beyond_the_modes_is_kept():
    assert CP((2, 3), 50).rank == (50,)
    assert CP.decompose(torch.randn(2, 3, 4), 50).rank == (6,)


def test_matrix_decomposition_is_the_best_one():
    tensor = torch.randn(8, 6, dtype=torch.float64)
    tail = torch.linalg.svdvals(tensor)[3:].norm()
    assert torch.dist(CP.decompose(tensor, 3).reconstruct(), tensor).item() == pytest.approx(tail.item())


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_low_rank_tensors_are_found_within_a_percent(rank):
    torch.manual_seed(rank)
    tensor = CP((7, 8, 6), rank, dtype=torch.float64).reconstruct().detach()
    error = torch.dist(CP.decompose(tensor, rank).reconstruct(), tensor) / tensor.norm()
    assert error < 0.01


def test_rank_above_that_of_the_tensor():
    tensor = torch.ones(5, 6, 7)
    torch.testing.assert_close(CP.decompose(tensor, 9).reconstruct(), tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(8, 1, 6), (1, 8, 6), (8, 6, 1), (1, 8, 1, 6)])
def test_modes_of_size_one_leave_a_matrix(shape):
    tensor = torch.randn(shape, dtype=torch.float64)
    tail = torch.linalg.svdvals(tensor.squeeze())[3:].norm()
    made = CP.decompose(tensor, 3)
    assert torch.dist(made.reconstruct(), tensor).item() == pytest.approx(tail.item())
