"""Into which modes the widths of a layer are split."""

import math
from collections.abc import Mapping, Sequence

from tenzoo.factorizations import Factorization
from tenzoo.layers.tensorization import layer_modes, network_of, split_size

LARGEST_MODE = 16
"""Up to which a mode of a factor of a low-rank update is chosen."""

_SMOOTH = 2**12
"""A size that has as many factors as wanted."""


def network_modes(kind: type[Factorization], sizes: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Factors of both sizes of a layer, for one network: those that the layers have by default.

    A size that does not split into factors that are alike is covered by a slightly larger product.

    Args:
        kind: The format.
        sizes: The sizes by name.

    Raises:
        ValueError: If the format has no tensors of a suitable order.

    Example:
        >>> from tenzoo.factorizations import CP, TensorTrain
        >>> network_modes(TensorTrain, {"out_features": 768, "in_features": 1021})
        ((12, 8, 8), (11, 10, 10))
        >>> network_modes(CP, {"out_features": 768, "in_features": 1021})
        ((768,), (1021,))
    """
    numbers = [len(side) for side in layer_modes(kind, None, dict.fromkeys(sizes, _SMOOTH))[0]]
    first, second = (_alike(size, number) for size, number in zip(sizes.values(), numbers, strict=True))
    return first, second


def matrix_modes(kind: type[Factorization], size: int) -> tuple[int, ...]:
    """Modes of at most 16, as alike as possible, whose product is the number of entries of a matrix or a little more.

    Args:
        kind: The format. One that has no tensors of the wanted order gets the nearest order that it has.
        size: Number of entries.

    Raises:
        ValueError: If the format has no tensors of two to twelve modes.

    Example:
        >>> from tenzoo.factorizations import TensorTrain
        >>> matrix_modes(TensorTrain, 768 * 8), matrix_modes(TensorTrain, 1021 * 8)
        ((12, 8, 8, 8), (10, 10, 10, 9))
    """
    wanted = max(2, math.ceil(math.log(size, LARGEST_MODE) - 1e-9))
    orders = [order for order in range(2, 13) if network_of(kind, order)]
    if not orders:
        raise ValueError(f"expected a format with tensors of two to twelve modes in `factorization`, got {kind.name!r}")
    order = min(orders, key=lambda order: (abs(order - wanted), order))
    return _alike(size, order)


def check_modes(modes: Sequence[int], size: int, of: str) -> None:
    """Refuse modes that do not multiply to a size.

    Args:
        modes: As given.
        size: The product.
        of: What has this size, for the message.

    Raises:
        ValueError: Naming the modes and the size.
    """
    if math.prod(modes) != size:
        raise ValueError(
            f"expected modes with the product {size} for {of} in `modes`, such as {list(split_size(size, 4))}, got "
            f"{list(modes)} with the product {math.prod(modes)}"
        )


def _alike(size: int, number: int) -> tuple[int, ...]:
    """Factors of a size, or of a little more if the largest would be twice as large as need be."""
    exact = split_size(size, number)
    if exact[0] <= 2 * size ** (1 / number):
        return exact + (1,) * (number - len(exact))
    return _covered(size, number)


def _covered(size: int, number: int) -> tuple[int, ...]:
    """Factors that are alike, whose product is the size or a little more."""
    if number == 1:
        return (size,)
    first = math.ceil(size ** (1 / number) - 1e-9)
    return first, *_covered(math.ceil(size / first), number - 1)
