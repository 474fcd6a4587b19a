"""Decompositions in a metric of their own."""

import pytest
import torch

from tenzoo.factorizations import FACTORIZATIONS, TensorTrain
from tenzoo.factorizations.decomposition import multiply_modes
from tests.factorizations.formats import NAMES

SHAPE = (4, 5, 6, 3)


def case():
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
    metric = {k: torch.randn(SHAPE[k], SHAPE[k], dtype=torch.float64, generator=generator) for k in (1, 3)}
    return tensor, metric


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_is_exact_in_any_metric(name):
    tensor, metric = case()
    torch.testing.assert_close(FACTORIZATIONS[name].decompose(tensor, 500, metric=metric).reconstruct(), tensor)


@pytest.mark.parametrize("name", NAMES)
def test_a_decomposition_in_a_metric_is_that_of_the_multiplied_tensor(name):
    tensor, metric = case()
    kind = FACTORIZATIONS[name]
    multiplied = kind.decompose(multiply_modes(tensor, metric), 2).reconstruct()
    made = kind.decompose(tensor, 2, metric=metric).reconstruct()
    torch.testing.assert_close(multiply_modes(made, metric), multiplied)


@pytest.mark.parametrize("name", NAMES)
def test_a_diagonal_is_the_matrix_with_it(name):
    tensor, _ = case()
    kind = FACTORIZATIONS[name]
    diagonals = {k: torch.arange(1.0, SHAPE[k] + 1, dtype=torch.float64) for k in (0, 2)}
    matrices = {k: torch.diag(diagonal) for k, diagonal in diagonals.items()}
    torch.testing.assert_close(multiply_modes(tensor, diagonals), multiply_modes(tensor, matrices))
    made = kind.decompose(tensor, 2, metric=diagonals).reconstruct()
    torch.testing.assert_close(made, kind.decompose(tensor, 2, metric=matrices).reconstruct())


@pytest.mark.parametrize("name", NAMES)
def test_the_identity_changes_nothing(name):
    tensor, _ = case()
    kind = FACTORIZATIONS[name]
    metric = {k: torch.eye(size, dtype=torch.float64) for k, size in enumerate(SHAPE)}
    torch.testing.assert_close(
        kind.decompose(tensor, 2, metric=metric).reconstruct(), kind.decompose(tensor, 2).reconstruct()
    )


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ({4: torch.eye(4)}, "modes from 0 to 3 in `metric`, got 4"),
        ({1: torch.eye(4)}, r"shape \(5, 5\) or \(5,\) for mode 1 in `metric`, got \(4, 4\)"),
        ({1: torch.full((5, 5), torch.nan)}, "finite numbers for mode 1 in `metric`"),
    ],
)
def test_matrices_that_do_not_fit(metric, message):
    with pytest.raises(ValueError, match=message):
        TensorTrain.decompose(case()[0], 2, metric=metric)
