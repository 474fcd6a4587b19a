"""Decompositions end with the smallest cores that make the same tensor."""

import pytest
import torch

from tenzoo.dynamics import norm_deviation, squared_norms
from tenzoo.factorizations import FACTORIZATIONS
from tenzoo.factorizations.balance import balanced, balanced_slices
from tenzoo.factorizations.network import Network
from tests.factorizations.formats import NAMES, dense_oracle

SHAPES = {"btt": (4, 3, 2, 3, 4, 2)}
RANKS = {"cp": 5, "tucker": [3, 2, 3], "tt": [3, 4], "tr": [2, 3, 2], "btt": [3, 2], "ht": 3, "btd": [2, 3, 2, 3]}
MATRIX = Network([(0, "r"), ("r", 1)], 2, lambda rank, order: {"r": rank[0]})


def decomposed(name):
    torch.manual_seed(0)
    tensor = torch.randn(SHAPES.get(name, (5, 4, 6)), dtype=torch.float64)
    return FACTORIZATIONS[name].decompose(tensor, RANKS[name])


@pytest.mark.parametrize("name", NAMES)
def test_all_cores_of_a_decomposition_have_the_same_norm(name):
    cores = decomposed(name).cores
    squares = squared_norms(list(cores)).detach()
    if name == "cp":  # component by component
        squares = torch.stack([core.detach().square().sum(0) for core in cores])
        torch.testing.assert_close(squares, squares[:1].expand_as(squares))
        return
    assert norm_deviation(squares) < 1e-4 * squares.mean() ** 2


@pytest.mark.parametrize("name", NAMES)
def test_no_cores_of_the_same_tensor_are_smaller(name):
    """The sum of squared norms is stationary under every change of a bond that leaves the tensor alone."""
    made = decomposed(name)
    network = made.network(len(made.shape))
    cores = [core.detach() for core in made.cores]
    torch.manual_seed(1)

    def changed(bond, direction, step):
        (first, dim), (second, other), *_ = network.holders[bond]
        if bond in network.hyperedges:
            matrix = torch.diag(torch.exp(step * direction.diagonal()))
        else:
            matrix = torch.linalg.matrix_exp(step * direction)
        result = list(cores)
        result[first] = torch.tensordot(cores[first], matrix, dims=([dim], [0])).movedim(-1, dim)
        result[second] = torch.tensordot(torch.linalg.inv(matrix), cores[second], dims=([1], [other])).movedim(0, other)
        return result

    for bond in (*network.pairs, *network.hyperedges):
        size = network.sizes(made.shape, made.rank)[bond]
        direction = torch.randn(size, size, dtype=torch.float64)
        direction /= direction.norm()
        torch.testing.assert_close(dense_oracle(name, changed(bond, direction, 0.1)), dense_oracle(name, cores))
        sizes = [
            sum(float(core.square().sum()) for core in changed(bond, direction, step)) for step in (-1e-2, 0.0, 1e-2)
        ]
        assert sizes[1] < sizes[0]
        assert sizes[1] < sizes[2]
        assert abs(sizes[2] - sizes[0]) < 0.2 * (sizes[0] + sizes[2] - 2 * sizes[1])


def test_a_core_without_some_directions_is_left_with_finite_numbers():
    torch.manual_seed(0)
    first, second = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    first[:, 2] = 0
    product = first @ second
    made = balanced([first, second], MATRIX)
    torch.testing.assert_close(made[0] @ made[1], product)
    assert all(bool(torch.isfinite(core).all()) for core in made)
    zero = balanced([torch.zeros(2, 3), torch.ones(3, 2)], MATRIX)
    assert not (zero[0] @ zero[1]).any()
    slices = balanced_slices([torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [8.0]])])
    torch.testing.assert_close(slices[0] * slices[1], torch.tensor([[0.0], [16.0]]))
