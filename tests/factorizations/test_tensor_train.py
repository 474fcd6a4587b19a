import pytest
import tltorch
import torch

from tenzoo.factorizations import TensorTrain
from tests.factorizations.formats import EntriesConformance, FactorizationConformance


class TestTensorTrain(FactorizationConformance):
    name, shape, rank = "tt", (3, 4, 2), [2, 3]


class TestTensorTrainOfOrderFive(FactorizationConformance):
    name, shape, rank = "tt", (2, 3, 2, 1, 3), [2, 3, 1, 2]


class TestTensorTrainEntries(EntriesConformance):
    name, shape, rank = "tt", (3, 4, 2), [2, 3]


def test_reconstruct_is_that_of_tltorch():
    factorization = TensorTrain((4, 5, 3), [2, 3])
    guest = tltorch.TTTensor([core.detach() for core in factorization.cores])
    torch.testing.assert_close(factorization.reconstruct(), guest.to_tensor())


def test_ranks_of_a_decomposition_are_clipped_from_the_left():
    assert TensorTrain.decompose(torch.randn(3, 4, 5, 6), 1000).rank == (3, 12, 6)
    assert TensorTrain.decompose(torch.randn(3, 4, 5, 6), [1, 100, 100]).rank == (1, 4, 6)
    assert TensorTrain((3, 4), 1000).rank == (1000,)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_error_is_at_most_that_of_the_truncated_unfoldings(rank):
    torch.manual_seed(0)
    tensor = torch.randn(3, 4, 5, 3, dtype=torch.float64)
    unfoldings = [tensor.reshape(3, -1), tensor.reshape(12, -1), tensor.reshape(60, -1)]
    bound = sum(torch.linalg.svdvals(matrix)[rank:].square().sum() for matrix in unfoldings)
    error = (TensorTrain.decompose(tensor, rank).reconstruct() - tensor).square().sum()
    assert error <= bound * (1 + 1e-9) + 1e-20
