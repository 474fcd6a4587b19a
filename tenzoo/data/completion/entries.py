"""What every tensor-completion dataset is reduced to: indexed values, checked once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tenzoo.data.arrays import Array

_MAX_INT64 = 2**63 - 1
_MAX_EXACT_FLOAT = 2**53
_MAX_ROUNDING = 0.01
"""Largest rounding error of float32, in standard deviations of the values; it costs R² less than 1e-4."""


class CompletionBatch(NamedTuple):
    """One batch of tensor entries.

    Example:
        >>> batch = CompletionBatch(torch.tensor([[0, 1]]), torch.tensor([2.5]))
        >>> batch.index.shape[1] == 2 and batch.value.item() == 2.5
        True
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """Where the entries stand, shape ``(B, order)``, int64."""
    value: Tensor
    """What stands there, shape ``(B,)``, float32; NaN where unknown (in prediction only)."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Known entries of a tensor: row i says that the value at ``index[i]`` is ``value[i]``.

    Args:
        index: Shape ``(n, order)``, int64.
        value: Shape ``(n,)``, float32.
        mode_names: The names of the modes, if the data has any.

    Example:
        >>> entries = Entries(torch.tensor([[0, 1], [2, 0]]), torch.tensor([1.0, -1.0]))
        >>> len(entries), entries.take(torch.tensor([1])).index.tolist()
        (2, [[2, 0]])
    """

    index: Tensor
    value: Tensor
    mode_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.value.numel()

    def take(self, rows: Tensor) -> "Entries":
        """The entries of the given rows, in the order of ``rows``, shape ``(m,)``."""
        return Entries(self.index[rows], self.value[rows], self.mode_names)


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
    """Indices as int64, and the shape they belong to.

    Args:
        index: Shape ``(n, order)``. Floats are allowed where all of them are whole.
        shape: The mode sizes; ``None`` takes the largest index of each mode plus 1.
        arg: Name of the argument, for the error.

    Raises:
        ValueError: If the indices are no such array, negative, or outside of the shape.

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
        if (np.signbit(index) & (index == 0)).any():  # "-0,33" of decimal commas
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
        ValueError: If they are not real numbers, one is infinite or beyond float32, at either end, or float32 rounds at
            their mean by more than a hundredth of their standard deviation.

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
            f"expected values in `{arg}` that float32 tells from 0, got {count} that it does not; rescale the values"
        )
    _check_rounding(values[~np.isnan(converted)], arg=arg)
    return converted


def _check_rounding(known: Array, *, arg: str) -> None:
    """Refuses an offset that leaves float32, in which models compute in the units of the data, too few digits."""
    if known.size == 0 or known.min() == known.max():
        return
    mean, std = known.mean(dtype=np.float64), known.std(dtype=np.float64)
    rounding = np.spacing(np.float32(abs(mean))) / 2
    if rounding > _MAX_ROUNDING * std:
        raise ValueError(
            f"expected values in `{arg}` that float32 tells apart, got the mean {mean:.6g}, where it rounds by up to "
            f"{rounding:.1g}, with a standard deviation of {std:.3g}; subtract an offset first"
        )


def dense_entries(values: Array, *, arg: str) -> tuple[Entries, tuple[int, ...]]:
    """The known entries of a dense tensor in which NaN means missing, in lexicographic order.

    Raises:
        ValueError: If the order is below 2, a value is not finite, or every value is missing.

    Example:
        >>> entries, shape = dense_entries(np.array([[1.0, np.nan], [2.0, 3.0]]), arg="dataset")
        >>> len(entries), shape
        (3, (2, 2))
    """
    if values.ndim < 2:
        raise ValueError(f"expected a tensor of order 2 or more in `{arg}`, got order {values.ndim}; reshape it")
    converted = check_values(values, arg=arg)
    known = ~np.isnan(converted)
    if not known.any():
        raise ValueError(f"expected known entries in `{arg}`, got none in shape {values.shape}; NaN means missing")
    index = np.ascontiguousarray(np.argwhere(known), dtype=np.int64)
    return Entries(torch.from_numpy(index), torch.from_numpy(converted[known])), tuple(values.shape)


def sparse_entries(
    index: Array, values: Array, shape: Sequence[int] | None, *, arg: str
) -> tuple[Entries, tuple[int, ...]]:
    """The known entries of a list of entries, in lexicographic order; equal duplicates are merged, NaN is dropped.

    Args:
        index: Shape ``(n, order)``, integers.
        values: Shape ``(n,)``.
        shape: The mode sizes; ``None`` takes the largest index of each mode plus 1.
        arg: Name of the argument, for the error.

    Raises:
        ValueError: If an index or value is not valid, or an index stands there twice with different values.

    Example:
        >>> entries, _ = sparse_entries(np.array([[1, 0], [0, 1], [1, 0]]), np.array([5, 4, 5]), None, arg="dataset")
        >>> entries.index.tolist(), entries.value.tolist()
        ([[0, 1], [1, 0]], [4.0, 5.0])
    """
    index, sizes = check_index(index, shape, arg=arg)
    if values.shape != index.shape[:1]:
        raise ValueError(
            f"expected {len(index)} values, one per index, in `{arg}`, got shape {values.shape}; write one per row"
        )
    converted = check_values(values, arg=arg)
    known = ~np.isnan(converted)
    if not known.any():
        raise ValueError(f"expected known entries in `{arg}`, got {len(index)} missing ones; NaN means missing")
    index, converted = index[known], converted[known]
    order, group = group_rows(index)
    first = np.flatnonzero(np.diff(group, prepend=-1))
    differs = converted[order] != converted[order][first][group]
    if differs.any():
        row = np.flatnonzero(differs)[0]
        raise ValueError(
            f"expected one value per index in `{arg}`, got {converted[order][first][group][row]} and "
            f"{converted[order][row]} at {tuple(index[order][row].tolist())}; remove one of them"
        )
    kept = order[first]
    return Entries(torch.from_numpy(index[kept]), torch.from_numpy(converted[kept])), sizes


def group_rows(index: Array) -> tuple[Array, Array]:
    """The order that sorts rows lexicographically (stable), and the number of its distinct row at each place.

    Args:
        index: Shape ``(n, order)``.

    Returns:
        Two arrays of shape ``(n,)``: sorting permutation, and group numbers that count up from 0.

    Example:
        >>> [array.tolist() for array in group_rows(np.array([[1, 0], [0, 5], [1, 0]]))]
        [[1, 0, 2], [0, 1, 1]]
    """
    order = np.lexsort(index.T[::-1])
    ranked = index[order]
    return order, np.concatenate([[0], np.cumsum((ranked[1:] != ranked[:-1]).any(axis=1))])


def look_up(entries: Entries, index: Tensor) -> Tensor:
    """The values at the given indices, NaN where they are unknown. Needs no dense tensor and no flat index.

    Args:
        entries: The known entries, each index once.
        index: Shape ``(m, order)``; repetitions are allowed.

    Returns:
        Shape ``(m,)``, float32.

    Example:
        >>> look_up(Entries(torch.tensor([[0, 1]]), torch.tensor([2.0])), torch.tensor([[0, 0], [0, 1]])).tolist()
        [nan, 2.0]
    """
    order, group = group_rows(torch.cat([entries.index, index]).numpy())
    number = np.empty_like(order)
    number[order] = group
    value = torch.full((int(group[-1]) + 1,), math.nan)
    value[torch.from_numpy(number[: len(entries)])] = entries.value
    return value[torch.from_numpy(number[len(entries) :])]
