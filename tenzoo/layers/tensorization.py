"""How the sizes of a layer are split into the modes of a tensor."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TypeAlias

Tensorization: TypeAlias = Sequence[Sequence[int]]
"""The factors of a layer's output size and those of its input size; for an embedding those of rows and of columns."""

MAX_MODES = 3
"""Into how many factors a size is split by default."""


def split_size(size: int) -> tuple[int, ...]:
    """A size as a product of at most three factors, as equal as its prime factors allow, the largest first.

    Example:
        >>> split_size(16), split_size(32), split_size(64), split_size(768), split_size(13)
        ((4, 2, 2), (4, 4, 2), (4, 4, 4), (12, 8, 8), (13,))
    """
    factors = [1] * MAX_MODES
    for prime in reversed(_primes(size)):
        factors[factors.index(min(factors))] *= prime
    return tuple(sorted((factor for factor in factors if factor > 1), reverse=True)) or (1,)


def whole_size(size: int) -> tuple[int, ...]:
    """A size as one mode."""
    return (size,)


def cover_size(size: int) -> tuple[int, ...]:
    """Three factors whose product is the size or a little more, where the size itself has no factors that are alike.

    Example:
        >>> cover_size(50_000), cover_size(50_257)
        ((50, 40, 25), (37, 37, 37))
    """
    exact = split_size(size)
    root = round(size ** (1 / MAX_MODES))
    if exact[0] <= 2 * root:
        return exact
    first = math.ceil(size ** (1 / 3))
    second = math.ceil(math.sqrt(size / first))
    return first, second, math.ceil(size / (first * second))


def check_sizes(**sizes: object) -> None:
    """Refuse what is no size: torch takes some layers without any weight, or fails at the first input.

    Args:
        **sizes: By the names of the arguments.

    Raises:
        TypeError: If one is no int.
        ValueError: If one is below 1.

    Example:
        >>> check_sizes(in_features=0)
        Traceback (most recent call last):
        ...
        ValueError: expected an int >= 1 in `in_features`, got 0
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise TypeError(f"expected an int >= 1 in `{name}`, got {size!r}")
        if size < 1:
            raise ValueError(f"expected an int >= 1 in `{name}`, got {size!r}")


def check_tensorization(
    tensorization: Tensorization | None,
    sizes: Mapping[str, int],
    default: tuple[tuple[int, ...], tuple[int, ...]],
    *,
    covers: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The factors of both sizes, checked.

    Args:
        tensorization: As given; None takes the default.
        sizes: What the two products have to be, and what the sizes are called.
        default: The factors without ``tensorization``.
        covers: Whether the first product may be larger than its size.

    Raises:
        TypeError: If it is not two sequences of ints.
        ValueError: If a factor is below 1, or a product is another one.

    Example:
        >>> check_tensorization([[4, 2], [3]], {"out_features": 8, "in_features": 3}, ((8,), (3,)))
        ((4, 2), (3,))
    """
    if tensorization is None:
        return default
    (first_name, first_size), (second_name, second_size) = sizes.items()
    example = [list(side) for side in default]
    valid = f"the factors of {first_name} ({first_size}) and of {second_name} ({second_size}), such as {example},"
    lists = isinstance(tensorization, Sequence) and all(
        isinstance(side, Sequence) and not isinstance(side, str | bytes) for side in tensorization
    )
    factors = [factor for side in tensorization for factor in side] if lists else []
    if not lists or not all(isinstance(factor, Integral) and not isinstance(factor, bool) for factor in factors):
        raise TypeError(f"expected {valid} in `tensorization`, got {tensorization!r}")
    if len(tensorization) != 2 or not all(tensorization) or min(factors) < 1:
        raise ValueError(f"expected {valid} in `tensorization`, got {tensorization!r}")
    first, second = (tuple(int(factor) for factor in side) for side in tensorization)
    fits = math.prod(first) >= first_size if covers else math.prod(first) == first_size
    if not fits or math.prod(second) != second_size:
        raise ValueError(f"expected {valid} in `tensorization`, got {tensorization!r}")
    return first, second


def paired(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both with equally many factors, the shorter one filled up with ones, as a block tensor train needs them.

    Example:
        >>> paired((4, 2), (3,))
        ((4, 2), (3, 1))
    """
    order = max(len(first), len(second))
    return first + (1,) * (order - len(first)), second + (1,) * (order - len(second))


def _primes(size: int) -> list[int]:
    primes, divisor = [], 2
    while divisor * divisor <= size:
        while size % divisor == 0:
            primes.append(divisor)
            size //= divisor
        divisor += 1
    return [*primes, size] if size > 1 else primes
