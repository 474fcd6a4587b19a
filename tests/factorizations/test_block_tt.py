import pytest
import tltorch
import torch

from tenzoo.factorizations import BlockTT
from tests.factorizations.formats import EntriesConformance, FactorizationConformance


class TestBlockTT(FactorizationConformance):
    name, shape, rank = "btt", (2, 3, 2, 2), 3


class TestBlockTTOfThreeCores(FactorizationConformance):
    name, shape, rank = "btt", (2, 3, 1, 2, 1, 3), [2, 3]


class TestBlockTTOfOneCore(FactorizationConformance):
    name, shape, rank = "btt", (3, 4), 1


class TestBlockTTEntries(EntriesConformance):
    name, shape, rank = "btt", (2, 3, 2, 2), 3


def test_reconstruct_is_that_of_tltorch():
    factorization = BlockTT((2, 3, 4, 5), 3)
    guest = tltorch.BlockTT(
        [core.detach() for core in factorization.cores], tensorized_shape=((2, 3), (4, 5)), rank=(1, 3, 1)
    )
    torch.testing.assert_close(factorization.reconstruct().reshape(6, 20), guest.to_matrix())


def test_one_core_is_the_matrix_and_has_no_rank():
    factorization = BlockTT((3, 4), 7)
    assert factorization.rank == ()
    assert torch.equal(factorization.reconstruct(), factorization.cores[0][0, :, :, 0])
    assert BlockTT((3, 4), []).rank == ()
    assert BlockTT((3, 4), 1.0).rank == ()


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_two_cores_are_the_best_approximation(rank):
    tensor = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    paired = tensor.permute(0, 2, 1, 3).reshape(8, 15)
    tail = torch.linalg.svdvals(paired)[rank:].norm().item()
    assert torch.dist(BlockTT.decompose(tensor, rank).reconstruct(), tensor).item() == pytest.approx(tail)
