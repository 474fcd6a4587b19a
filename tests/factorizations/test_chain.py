import pytest
import torch

from tenzoo.factorizations.chain import best_split, chain_entries, multiply_batch, reconstruct_chain, usable_chain_rank
from tests.factorizations.formats import dense_oracle


@pytest.mark.parametrize("ranks", [(1, 3, 2, 4, 1), (3, 2, 4, 2, 3)])
@pytest.mark.parametrize("split", [1, 2, 3])
def test_every_split_rebuilds_the_same_tensor(ranks, split):
    modes = (2, 3, 4, 2)
    cores = [torch.randn(ranks[k], modes[k], ranks[k + 1], dtype=torch.float64) for k in range(4)]
    torch.testing.assert_close(reconstruct_chain(cores, split).reshape(modes), dense_oracle("tr", cores))


def test_split_follows_the_ranks():
    assert best_split([10, 10, 10, 10], [1, 2, 50, 50, 1]) == 1
    assert best_split([10, 10, 10, 10], [1, 50, 50, 2, 1]) == 3
    assert best_split([7, 9], [1, 2, 1]) == 1
    assert best_split([7], [1, 1]) == 0


@pytest.mark.parametrize("rank", [2, 20])
@pytest.mark.parametrize("ring", [1, 3])
def test_entries_are_traces(rank, ring):
    shapes = [(5, ring, rank), (5, rank, rank), (5, rank, ring)]
    a, b, c = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    torch.testing.assert_close(chain_entries([a, b, c]), torch.einsum("nab,nbc,nca->n", a, b, c))


@pytest.mark.parametrize(("rows", "rank"), [(1, 3), (1, 40), (2, 3)])
def test_both_ways_to_multiply(rows, rank):
    left, right = torch.randn(4, rows, rank, dtype=torch.float64), torch.randn(4, rank, rank, dtype=torch.float64)
    torch.testing.assert_close(multiply_batch(left, right), left @ right)


def test_usable_ranks():
    assert usable_chain_rank([2, 3, 4, 5], [99, 99, 99]) == (2, 6, 5)
    assert usable_chain_rank([2, 3, 4, 5], [1, 99, 99]) == (1, 3, 5)
    assert usable_chain_rank([3, 4], [99], left=2, right=3) == (6,)
    assert usable_chain_rank([3], []) == ()
