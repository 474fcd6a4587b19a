"""How the sizes of a layer are split into the modes of a tensor."""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Integral
from typing import TypeAlias

from tenzoo.factorizations import Factorization, OrderError
from tenzoo.factorizations.network import Network

Tensorization: TypeAlias = Sequence[Sequence[int]]
"""The factors of a layer's output size and those of its input size; for an embedding those of rows and of columns."""

MAX_MODES = 3
"""Into how many factors a size is split by default."""


def split_size(size: int, number: int = MAX_MODES) -> tuple[int, ...]:
    """A size as a product of factors, as equal as its prime factors allow, the largest first and none of them 1.

    Args:
        size: The product.
        number: How many factors at most.

    Example:
        >>> split_size(16), split_size(32), split_size(64), split_size(768), split_size(13), split_size(16, 2)
        ((4, 2, 2), (4, 4, 2), (4, 4, 4), (12, 8, 8), (13,), (4, 4))
    """
    factors = [1] * number
    for prime in reversed(_primes(size)):
        factors[factors.index(min(factors))] *= prime
    return tuple(sorted((factor for factor in factors if factor > 1), reverse=True)) or (1,)


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


def layer_modes(
    kind: type[Factorization],
    tensorization: Tensorization | None,
    sizes: Mapping[str, int],
    *,
    kernel: int | None = None,
    covers: bool = False,
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]:
    """The factors of both sizes of a layer, and the modes of its tensor.

    The modes are ``(*first, *second)``, with the pixels of a kernel between them. A format whose cores have two modes
    each, as those of a tensorized matrix, gets equally many factors on both sides, the shorter side filled up with
    ones, and a 1 after the second side for the kernel.

    By default a size stays whole where each mode has a factor of its own, as in CP and Tucker, and in convolutions
    also in other networks without a loop, such as trains; all others get up to three factors of each size. A format of
    another order gets as many factors as it has modes.

    Args:
        kind: The format.
        tensorization: The factors as given; None takes the default.
        sizes: What the two products have to be, by the names of the sizes.
        kernel: Number of pixels of a kernel; None, as for one pixel, where there is no such mode.
        covers: Whether the first product may be larger than its size.

    Raises:
        TypeError: If ``tensorization`` is not two sequences of ints.
        OrderError: If the format has no tensors of this order.
        ValueError: If a factor is below 1, or a product is another one.

    Example:
        >>> from tenzoo.factorizations import BlockTT, TensorTrain
        >>> layer_modes(TensorTrain, None, {"out_features": 16, "in_features": 6})
        (((4, 2, 2), (3, 2)), (4, 2, 2, 3, 2))
        >>> layer_modes(BlockTT, [[4, 2], [3]], {"out_channels": 8, "in_channels": 3}, kernel=9)
        (((4, 2), (3, 1)), (4, 2, 9, 3, 1, 1))
    """
    first, second = check_tensorization(
        tensorization, sizes, _default(kind, [*sizes.values()], kernel, covers), covers=covers
    )
    pixels = (kernel,) if kernel and kernel > 1 else ()
    if _pairs_modes(kind):
        first, second = _paired(first, second)
        shape = (*first, *pixels, *second, *(1 for _ in pixels))
    else:
        shape = (*first, *pixels, *second)
    kind.network(len(shape))
    return (first, second), shape


def fits(kind: type[Factorization], sizes: Mapping[str, int], kernel: int | None = None) -> bool:
    """Whether a layer of these sizes can have a format.

    Example:
        >>> from tenzoo.factorizations import einsum_format
        >>> fits(einsum_format("ar,br->ab"), {"out_channels": 8, "in_channels": 4}, 9)
        False
    """
    try:
        layer_modes(kind, whole_modes(kind, sizes, kernel), sizes, kernel=kernel)
    except OrderError:
        return False
    return True


def whole_modes(kind: type[Factorization], sizes: Mapping[str, int], kernel: int | None = None) -> Tensorization | None:
    """Both sizes of a layer as one mode each; None for a format that has no such tensor.

    Args:
        kind: The format.
        sizes: The sizes by name.
        kernel: Number of pixels of a kernel.

    Example:
        >>> from tenzoo.factorizations import BlockTT, TensorRing
        >>> whole_modes(TensorRing, {"out_features": 16, "in_features": 6}), whole_modes(BlockTT, {"out": 16, "in": 6})
        (((16,), (6,)), None)
    """
    first, second = sizes.values()
    has_network = network_of(kind, 2 + int(kernel is not None and kernel > 1)) is not None
    return ((first,), (second,)) if has_network and not _pairs_modes(kind) else None


def _default(
    kind: type[Factorization], sizes: Sequence[int], kernel: int | None, covers: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The factors of both sizes that fit the format best."""
    pixels = int(kernel is not None and kernel > 1)
    first, second = sizes
    network = network_of(kind, 2 + pixels)
    if network and not network.pairs_modes and (network.has_factors or (kernel is not None and not network.has_loops)):
        return (first,), (second,)
    split = cover_size(first) if covers else split_size(first), split_size(second)
    pairs = _pairs_modes(kind)
    numbers = itertools.product(range(1, MAX_MODES + 1), repeat=2)
    counts = [n for n in numbers if not pairs or n[0] == n[1]]
    if network_of(kind, 2 * (max(map(len, split)) + pixels) if pairs else len(split[0]) + len(split[1]) + pixels):
        return split
    for left, right in sorted(counts, key=lambda n: (abs(n[0] - n[1]), n)):
        if network_of(kind, left + right + (2 if pairs else 1) * pixels):
            return _factors(first, left), _factors(second, right)
    return split


def _factors(size: int, number: int) -> tuple[int, ...]:
    factors = split_size(size, number)
    return factors + (1,) * (number - len(factors))


def network_of(kind: type[Factorization], order: int) -> Network | None:
    """The network of a format; None if it has no tensors of this order.

    Example:
        >>> from tenzoo.factorizations import BlockTT
        >>> network_of(BlockTT, 3) is None
        True
    """
    try:
        return kind.network(order)
    except OrderError:
        return None


@cache
def _pairs_modes(kind: type[Factorization]) -> bool:
    """Whether the cores of a format have two modes each."""
    networks = (network_of(kind, order) for order in range(2, 4 * MAX_MODES, 2))
    return any(network is not None and network.pairs_modes for network in networks)


def _paired(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both with equally many factors, the shorter one filled up with ones, as a block tensor train needs them.

    Example:
        >>> _paired((4, 2), (3,))
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
