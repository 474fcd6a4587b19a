"""Checks of shapes, indices and values of tensor entries."""

from collections.abc import Sequence

import numpy as np

from tenzoo.data.arrays import Array

_MAX_INT64 = 2**63 - 1
_MAX_EXACT_FLOAT = 2**53
_MAX_ROUNDING = 0.01
"""Largest rounding error of float32, in standard deviations of the values; it changes R² by less than 1e-4."""


def check_shape(shape: Sequence[int], *, arg: str = "shape") -> tuple[int, ...]:
    """The shape as a tuple of ints.

    Args:
        shape: Mode sizes, at least two, each at least 1.
        arg: Name of the argument, for the error.

    Raises:
        TypeError: If it is not a sequence of integers.
        ValueError: If it has fewer than two modes, or an empty mode.

    Example:
        >>> check_shape([3, 4])
        (3, 4)
    """
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"expected a sequence of integers in `{arg}`, got {shape!r}; give one size per mode")
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"expected integers in `{arg}`, got {size!r}; give one size per mode")
        if not 1 <= size <= _MAX_INT64:
            raise ValueError(f"expected sizes from 1 to 2^63 - 1 in `{arg}`, got {size}; give one size per mode")
    if len(shape) < 2:
        raise ValueError(f"expected at least 2 modes in `{arg}`, got {len(shape)}; give a tensor of order 2 or more")
    return tuple(shape)


def check_index(index: Array, shape: Sequence[int] | None, *, arg: str) -> tuple[Array, tuple[int, ...]]:
    """Indices as int64, and the shape of their tensor.

    Args:
        index: Shape ``(n, order)``. Floats are allowed where all of them are whole.
        shape: The mode sizes; ``None`` takes the largest index of each mode plus 1.
        arg: Name of the argument, for the error.

    Raises:
        ValueError: If the indices are not such an array, negative, or outside the shape.

    Example:
        >>> check_index(np.array([[0, 2], [1, 0]]), None, arg="dataset")[1]
        (2, 3)
    """
    if index.ndim != 2 or index.shape[0] == 0 or index.shape[1] < 2:
        raise ValueError(
            f"expected indices of shape (n, order) with n >= 1 and order >= 2 in `{arg}`, got {index.shape}; "
            "write one row per entry, one column per mode"
        )
    if index.dtype.kind == "f":
        index = index.astype(np.float64)
        whole = np.isfinite(index) & (np.floor(index) == index) & (np.abs(index) < _MAX_EXACT_FLOAT)
        if not whole.all():
            raise ValueError(f"expected integer indices in `{arg}`, got {index[~whole][0]}; write whole numbers")
        if (np.signbit(index) & (index == 0)).any():  # from a decimal comma, as in "-0,33"
            raise ValueError(f"expected indices of at least 0 in `{arg}`, got -0; write decimals with a point")
    elif index.dtype.kind not in "iu":
        raise ValueError(f"expected integer indices in `{arg}`, got dtype {index.dtype}; convert them to int64")
    if index.min() < 0:
        raise ValueError(f"expected indices of at least 0 in `{arg}`, got {index.min()}; count indices from 0")
    sizes = check_shape([int(largest) + 1 for largest in index.max(axis=0)], arg=arg)
    if shape is None:
        return np.ascontiguousarray(index, dtype=np.int64), sizes
    if len(shape) != len(sizes) or any(needed > size for needed, size in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"expected indices inside the shape {tuple(shape)} in `{arg}`, got {len(sizes)} columns with the largest "
            f"indices {tuple(size - 1 for size in sizes)}; give the right `shape`, and count indices from 0"
        )
    return np.ascontiguousarray(index, dtype=np.int64), tuple(shape)


def check_values(values: Array, *, arg: str) -> Array:
    """Values of any shape as float32.

    Raises:
        ValueError: If they are not real numbers, one is infinite or too large or too small for float32, or float32
            rounds at their mean by more than a hundredth of their standard deviation.

    Example:
        >>> check_values(np.array([1, 2]), arg="dataset").dtype.name
        'float32'
    """
    if values.dtype.kind not in "iuf":
        raise ValueError(f"expected real numbers in `{arg}`, got dtype {values.dtype}; convert the values to float32")
    with np.errstate(over="ignore", invalid="ignore"):
        converted = values.astype(np.float32)
    if count := int(np.isinf(converted).sum()):
        raise ValueError(
            f"expected finite float32 values in `{arg}`, got {count} infinite ones; "
            "mark missing entries by NaN, or rescale the values"
        )
    if count := int(((converted == 0) & (values != 0)).sum()):
        raise ValueError(
            f"expected values in `{arg}` that float32 tells from 0, got {count} that it rounds to 0; rescale the values"
        )
    _check_rounding(values[~np.isnan(converted)], arg=arg)
    return converted


def _check_rounding(known: Array, *, arg: str) -> None:
    """Refuses an offset so large that float32, in which models compute, has too few digits for the deviations."""
    if known.size == 0 or known.min() == known.max():
        return
    mean, std = known.mean(dtype=np.float64), known.std(dtype=np.float64)
    rounding = np.spacing(np.float32(abs(mean))) / 2
    if rounding > _MAX_ROUNDING * std:
        raise ValueError(
            f"expected values in `{arg}` that float32 tells apart, got the mean {mean:.6g}, where it rounds by up to "
            f"{rounding:.1g}, with a standard deviation of {std:.3g}; subtract an offset first"
        )
