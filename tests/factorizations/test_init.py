import math

import pytest
import torch

from tenzoo.factorizations import FACTORIZATIONS
from tenzoo.factorizations.init import check_init_std, core_std

CASES = [
    ("cp", (3, 4, 5), 6),
    ("tucker", (4, 5, 6), [2, 3, 4]),
    ("tt", (4, 5, 6, 3), [2, 5, 3]),
    ("tr", (4, 5, 6), [2, 3, 4]),
    ("btt", (2, 3, 2, 2, 2, 3), [4, 3]),
    ("btt", (3, 4), 1),
]


@pytest.mark.parametrize(("name", "shape", "rank"), CASES)
@pytest.mark.parametrize("init_std", [1.0, 0.02])
def test_second_moment_is_exact(name, shape, rank, init_std):
    torch.manual_seed(0)
    factorization = FACTORIZATIONS[name](shape, rank, init_std=init_std, dtype=torch.float64)
    squares = []
    for _ in range(1500):
        factorization.reset_parameters()
        squares.append(factorization.reconstruct().detach().square().mean())
    moments = torch.stack(squares) / init_std**2
    standard_error = moments.std() / math.sqrt(len(moments))
    assert abs(moments.mean() - 1) < 4 * standard_error
    assert standard_error < 0.1


def test_cores_share_one_standard_deviation():
    torch.manual_seed(0)
    factorization = FACTORIZATIONS["tr"]((60, 60, 60), 10, init_std=0.3)
    expected = core_std(0.3, num_monomials=10**3, num_cores=3)
    for core in factorization.cores:
        assert core.std().item() == pytest.approx(expected, rel=0.05)
        assert abs(core.mean().item()) < 0.05 * expected


@pytest.mark.parametrize("init_std", [0.0, -1.0, float("inf"), float("nan")])
def test_rejected_values(init_std):
    with pytest.raises(ValueError, match="positive, finite float in `init_std`, got"):
        check_init_std(init_std)


@pytest.mark.parametrize("init_std", ["1", None, True, 1j])
def test_rejected_types(init_std):
    with pytest.raises(TypeError, match="in `init_std`, got"):
        check_init_std(init_std)
