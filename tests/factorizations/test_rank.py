import re

import numpy as np
import pytest
import torch

from tenzoo.factorizations import FACTORIZATIONS
from tenzoo.factorizations.rank import check_shape, resolve_rank
from tests.factorizations.formats import NAMES

SHAPE = (6, 4, 5, 2)
LENGTH = {"cp": 1, "tucker": 4, "tt": 3, "tr": 4, "btt": 1, "ht": 6, "btd": 5}


def ints(number):
    return "1 int" if number == 1 else f"{number} ints"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rank", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (0.0, ValueError),
        (-0.5, ValueError),
        (1.5, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (True, TypeError),
        ("2", TypeError),
        (b"2", TypeError),
        (None, TypeError),
        (1j, TypeError),
        ({2}, TypeError),
        (np.bool_(True), TypeError),
        (torch.tensor(2), TypeError),
    ],
)
def test_rejected_ranks(name, rank, error):
    for call in (FACTORIZATIONS[name], FACTORIZATIONS[name].num_parameters):
        with pytest.raises(error, match=f"in `rank`, got {re.escape(repr(rank))}") as raised:
            call(SHAPE, rank)
        assert "\n" not in str(raised.value)
        assert f"list of {ints(LENGTH[name])} >= 1" in str(raised.value)


@pytest.mark.parametrize("name", NAMES)
def test_rejected_lists(name):
    cls, length = FACTORIZATIONS[name], LENGTH[name]
    for wrong in (length - 1, length + 1):
        with pytest.raises(ValueError, match=f"expected {ints(length)} in `rank` for this shape, got {wrong}"):
            cls(SHAPE, [2] * wrong)
    for value in (0, -3):
        with pytest.raises(ValueError, match=f"a list of {ints(length)} >= 1 in `rank`, got"):
            cls(SHAPE, [value] * length)
    for value in (2.0, True, "2", None):
        with pytest.raises(TypeError, match=f"a list of {ints(length)} >= 1 in `rank`, got"):
            cls(SHAPE, [value] * length)


@pytest.mark.parametrize("name", NAMES)
def test_accepted_ranks(name):
    cls, length = FACTORIZATIONS[name], LENGTH[name]
    for rank in (2, np.int64(2), [2] * length, (2,) * length, [np.int32(2)] * length, torch.Size([2] * length)):
        made = cls(SHAPE, rank)
        assert made.rank == (2,) * length
        assert all(type(r) is int for r in made.rank)
    assert cls(SHAPE, 1).rank == (1,) * length
    assert max(cls(SHAPE, 1.0).rank) > 1
    assert cls(SHAPE, np.float32(0.5)).rank == cls(SHAPE, 0.5).rank


def test_fraction_that_leaves_no_room_names_the_smallest():
    with pytest.raises(ValueError, match=r"rank one, which takes 17 of the 240 .*got 0.05; use at least 0\.0708"):
        FACTORIZATIONS["cp"](SHAPE, 0.05)
    for name in NAMES:
        with pytest.raises(ValueError, match="use at least") as raised:
            FACTORIZATIONS[name](SHAPE, 1e-6)
        least = float(str(raised.value).rsplit(" ", 1)[1])
        assert FACTORIZATIONS[name].num_parameters(SHAPE, least) == FACTORIZATIONS[name].num_parameters(SHAPE, 1)
        with pytest.raises(ValueError, match="rank one"):
            FACTORIZATIONS[name](SHAPE, least * (1 - 1e-9))


def test_fraction_of_a_shape_too_small_for_any():
    with pytest.raises(ValueError, match="give the rank as an int"):
        FACTORIZATIONS["cp"]((1, 1), 1.0)


def test_fraction_is_read_as_the_decimal_that_was_written():
    def rank_at(fraction: float) -> tuple[int, ...]:
        return resolve_rank(fraction, num_ranks=1, num_dense=100, num_parameters=lambda rank: rank[0])

    assert [rank_at(percent / 100) for percent in range(1, 101)] == [(percent,) for percent in range(1, 101)]


def test_budgets_beyond_every_machine_integer():
    shape = (10,) * 30
    assert FACTORIZATIONS["tt"].num_parameters(shape, 1e-25) <= 1e5
    assert FACTORIZATIONS["tt"].num_parameters(shape, 0.5) > 2**63


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ((4,), ValueError),
        ((), ValueError),
        ((4, 0), ValueError),
        ((4, -1), ValueError),
        ((4, 2.0), TypeError),
        ((4, True), TypeError),
        ("44", TypeError),
        (4, TypeError),
        (None, TypeError),
    ],
)
def test_rejected_shapes(shape, error):
    for name in NAMES:
        with pytest.raises(error, match="in `shape`, got"):
            FACTORIZATIONS[name](shape, 1)


def test_odd_order_of_a_matrix():
    with pytest.raises(ValueError, match=r"even number of sizes .* got 3"):
        FACTORIZATIONS["btt"]((2, 3, 4), 1)


def test_numpy_shapes():
    shape = check_shape([np.int64(3), 4])
    assert shape == (3, 4)
    assert all(type(size) is int for size in shape)
