"""Shapes and ranks as users write them: checked, and turned into a tuple of ints."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import TypeAlias

Rank: TypeAlias = int | float | Sequence[int]
"""An int is a uniform rank, a float in (0, 1] a fraction of the dense parameters, a sequence the ranks themselves."""


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a tensor of order 2 or more as a tuple of ints.

    Args:
        shape: Sizes of the modes, ints ≥ 1; NumPy's integers are taken too.

    Raises:
        TypeError: If ``shape`` is not a sequence, or holds something that is not an int.
        ValueError: If a size is below 1, or the order below 2.

    Example:
        >>> check_shape([4, 3])
        (4, 3)
    """
    if isinstance(shape, str | bytes) or not isinstance(shape, Sequence):
        raise TypeError(f"expected a sequence of ints in `shape`, got {shape!r}")
    if not all(_is_integer(size) for size in shape):
        raise TypeError(f"expected only ints in `shape`, got {shape!r}")
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"expected at least two sizes, each >= 1, in `shape`, got {tuple(shape)}")
    return tuple(int(size) for size in shape)


def resolve_rank(
    rank: Rank, *, num_ranks: int, num_dense: int, num_parameters: Callable[[tuple[int, ...]], int]
) -> tuple[int, ...]:
    """The ranks that a rank specification stands for.

    A fraction f becomes the largest uniform rank r with ``num_parameters((r, …, r)) <= f * num_dense``. It is read as
    the decimal number that was written, so that 0.3 of 10 parameters is 3 and not 2.999….

    Args:
        rank: An int (uniform), a float in (0, 1] (fraction of the dense parameters) or ``num_ranks`` ints. Note that
            ``1`` is rank one and ``1.0`` is as many parameters as the dense tensor has.
        num_ranks: How many ranks the format has.
        num_dense: Number of entries of the dense tensor.
        num_parameters: Maps ranks to the number of parameters, and never falls when a rank grows.

    Raises:
        TypeError: If ``rank`` is of another type, or a sequence holds something that is not an int.
        ValueError: If a rank is below 1, a fraction is outside (0, 1] or too small for rank one, or the sequence has
            the wrong length.

    Example:
        A 6 × 4 matrix has 24 entries, and r (6 + 4) parameters at rank r:

        >>> resolve_rank(0.9, num_ranks=1, num_dense=24, num_parameters=lambda rank: 10 * rank[0])
        (2,)
    """
    number = f"{num_ranks} int{'s' if num_ranks != 1 else ''}"
    valid = f"an int >= 1, a float in (0, 1] or a list of {number} >= 1"
    match rank:
        case bool() | str() | bytes():
            raise TypeError(f"expected {valid} in `rank`, got {rank!r}")
        case Integral():
            if rank < 1:
                raise ValueError(f"expected {valid} in `rank`, got {rank!r}")
            return (int(rank),) * num_ranks
        case Real():
            fraction = float(rank)
            if not 0 < fraction <= 1:  # NaN fails every comparison
                raise ValueError(f"expected {valid} in `rank`, got {rank!r}")
            return (_rank_within(fraction, num_ranks, num_dense, num_parameters),) * num_ranks
        case Sequence():
            if not all(_is_integer(value) for value in rank):
                raise TypeError(f"expected {valid} in `rank`, got {rank!r}")
            if len(rank) != num_ranks:
                raise ValueError(f"expected {number} in `rank` for this shape, got {len(rank)}: {rank!r}")
            if any(value < 1 for value in rank):
                raise ValueError(f"expected {valid} in `rank`, got {rank!r}")
            return tuple(int(value) for value in rank)
        case _:
            raise TypeError(f"expected {valid} in `rank`, got {rank!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _rank_within(
    fraction: float, num_ranks: int, num_dense: int, num_parameters: Callable[[tuple[int, ...]], int]
) -> int:
    def budget(value: float) -> int:
        return math.floor(Fraction(repr(value)) * num_dense)

    smallest = num_parameters((1,) * num_ranks)
    if smallest > budget(fraction):
        least = smallest / num_dense
        if budget(least) < smallest:  # the float nearest to the quotient may lie just below it
            least = math.nextafter(least, math.inf)
        remedy = f"use at least {least!r}" if least <= 1 else "give the rank as an int"
        raise ValueError(
            f"expected a fraction in `rank` that leaves room for rank one, which takes {smallest} of the {num_dense} "
            f"dense parameters, got {fraction!r}; {remedy}"
        )
    low, high = 1, budget(fraction) + 1  # low fits; where more ranks cost nothing more, high is never reached
    while high - low > 1:
        middle = (low + high) // 2
        if num_parameters((middle,) * num_ranks) <= budget(fraction):
            low = middle
        else:
            high = middle
    return low
