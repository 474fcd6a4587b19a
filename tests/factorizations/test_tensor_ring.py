import pytest
import torch
from tensorly.decomposition import tensor_ring_als

from tenzoo.factorizations import TensorRing, TensorTrain, als
from tenzoo.factorizations.decomposition import tensorly_on_torch
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


def test_ranks_of_a_decomposition():
    assert TensorRing.decompose(torch.randn(6, 4, 5, 3), 2).rank == (2, 2, 2, 2)
    assert TensorRing.decompose(torch.randn(6, 4, 5, 3), [1, 9, 4, 4]).rank == (1, 6, 4, 3)
    assert TensorRing.decompose(torch.randn(6, 4, 5, 3), 4).rank == (4, 4, 4, 4)
    assert TensorRing.decompose(torch.randn(4, 6, 2), 100).rank == (1, 4, 2)
    assert TensorRing.decompose(torch.randn(50, 2, 2), [3, 2, 100]).rank == (3, 2, 4)
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


@pytest.mark.parametrize(
    ("size", "rank", "usable"),
    [
        (64, [2, 33], (2, 32)),
        (64, [33, 2], (32, 2)),
        (64, 9, (8, 8)),
        (64, [3, 22], (3, 22)),  # 66: two more than there are singular values
        (64, 100, (1, 64)),
        (67, 9, (8, 9)),
        (8, [3, 2], (3, 2)),
    ],
)
def test_ranks_of_a_matrix_whose_product_is_enough_are_exact(size, rank, usable):
    tensor = torch.randn(size, size + 3, dtype=torch.float64)
    factorization = TensorRing.decompose(tensor, rank)
    assert factorization.rank == usable
    assert TensorRing.usable_rank(tuple(tensor.shape), usable) == usable
    tail = torch.linalg.svdvals(tensor)[usable[0] * usable[1] :].norm()
    rebuilt = torch.einsum("aib,bja->ij", *factorization.cores)
    torch.testing.assert_close(torch.dist(rebuilt, tensor), tail, rtol=1e-10, atol=1e-10 * float(tensor.norm()))


@pytest.mark.parametrize("rank", [3, 5, [2, 6, 3]])
def test_least_squares_are_as_good_as_those_of_tensorly(rank):
    ranks = [rank] * 3 if isinstance(rank, int) else rank
    generator = torch.Generator().manual_seed(0)
    ours = theirs = trains = 0.0
    for _ in range(6):
        tensor = torch.randn(8, 9, 8, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            factorization = TensorRing.decompose(tensor, rank)
            assert factorization.rank == tuple(ranks)
            ours += torch.dist(factorization.reconstruct(), tensor).item()
            trains += torch.dist(TensorRing.decompose(tensor, [1, *ranks[1:]]).reconstruct(), tensor).item()
        with tensorly_on_torch():
            made = tensor_ring_als(tensor, [*ranks, ranks[0]], random_state=0, n_iter_max=100)
            theirs += torch.dist(made.to_tensor(), tensor).item()
    assert ours < theirs < trains


def test_a_ring_is_found_again():
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        ring = TensorRing((6, 5, 7, 4), 3, dtype=torch.float64)
        tensor = ring.reconstruct().detach()
        again = TensorRing.decompose(tensor, 3)
        assert again.rank == ring.rank
        found.append(bool(torch.dist(again.reconstruct(), tensor) < 1e-3 * tensor.norm()))
    assert sum(found) >= 4  # least squares end in a local minimum now and then


def test_each_core_solves_its_least_squares_problem(monkeypatch):
    monkeypatch.setattr(als, "_RIDGE", 0.0)
    torch.manual_seed(0)
    tensor = torch.randn(4, 5, 3, 6, dtype=torch.float64)
    made = TensorRing.decompose(tensor, 2)
    error = (made.reconstruct() - tensor).square().sum()
    (gradient,) = torch.autograd.grad(error, made.cores[3])
    assert gradient.abs().max() < 1e-6 * tensor.norm()


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
