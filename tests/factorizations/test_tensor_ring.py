import pytest
import torch

from tenzoo.factorizations import TensorRing, TensorTrain
from tests.factorizations.formats import EntriesConformance, FactorizationConformance


class TestTensorRing(FactorizationConformance):
    name, shape, rank = "tr", (3, 4, 2), [2, 3, 4]


class TestTensorRingMatrix(FactorizationConformance):
    name, shape, rank = "tr", (3, 4), [2, 3]


class TestTensorRingEntries(EntriesConformance):
    name, shape, rank = "tr", (3, 4, 2), [2, 3, 4]


def test_a_ring_does_not_care_where_it_starts():
    factorization = TensorRing((3, 4, 2), [2, 3, 4], dtype=torch.float64)
    turned = TensorRing((4, 2, 3), [3, 4, 2], dtype=torch.float64)
    with torch.no_grad():
        for k, core in enumerate(turned.cores):
            core.copy_(factorization.cores[(k + 1) % 3])
    torch.testing.assert_close(turned.reconstruct(), factorization.reconstruct().permute(1, 2, 0))


def test_ranks_of_a_decomposition_share_the_first_mode():
    assert TensorRing.decompose(torch.randn(6, 4, 5, 3), 2).rank == (2, 2, 2, 2)
    assert TensorRing.decompose(torch.randn(6, 4, 5, 3), 4).rank == (1, 4, 4, 3)
    assert TensorRing.decompose(torch.randn(4, 6, 2), 100).rank == (1, 4, 2)
    assert TensorRing.decompose(torch.randn(50, 2, 2), [3, 2, 100]).rank == (2, 2, 4)
    assert TensorRing((2, 3), 100).rank == (100, 100)


def test_starved_modes_stay_lossless():
    tensor = torch.randn(2, 2, 18, 9, 2, dtype=torch.float64)
    assert torch.dist(TensorRing.decompose(tensor, 1000).reconstruct(), tensor) < 1e-10 * tensor.norm()


def test_open_ring_is_the_tensor_train():
    tensor = torch.randn(4, 5, 3, 4, dtype=torch.float64)
    ring, train = TensorRing.decompose(tensor, [1, 2, 3, 2]), TensorTrain.decompose(tensor, [2, 3, 2])
    torch.testing.assert_close(ring.reconstruct(), train.reconstruct())


@pytest.mark.parametrize("rank", [[2, 2], [1, 3], [3, 2]])
def test_matrix_decomposition_is_the_best_one(rank):
    tensor = torch.randn(8, 6, dtype=torch.float64)
    factorization = TensorRing.decompose(tensor, rank)
    assert factorization.rank == tuple(rank)
    tail = torch.linalg.svdvals(tensor)[rank[0] * rank[1] :].norm().item()
    assert torch.dist(factorization.reconstruct(), tensor).item() == pytest.approx(tail, abs=1e-12)


def test_error_of_a_ring_is_at_most_that_of_its_successive_truncations():
    torch.manual_seed(0)
    tensor = torch.randn(6, 4, 5, dtype=torch.float64)
    factorization = TensorRing.decompose(tensor, [2, 2, 3])
    assert factorization.rank == (2, 2, 3)
    _, S, Vh = torch.linalg.svd(tensor.reshape(6, -1), full_matrices=False)
    rest = (S[:4, None] * Vh[:4]).reshape(2, 2, 4, 5).permute(1, 2, 3, 0).reshape(8, 10)
    bound = S[4:].square().sum() + torch.linalg.svdvals(rest)[3:].square().sum()
    error = (factorization.reconstruct() - tensor).square().sum()
    assert error <= bound * (1 + 1e-9)
