"""The known entries of a tensor: indexed values, checked once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tenzoo.data.arrays import Array
from tenzoo.data.completion.entry_checks import check_index, check_values


class CompletionBatch(NamedTuple):
    """One batch of tensor entries.

    Example:
        >>> batch = CompletionBatch(torch.tensor([[0, 1]]), torch.tensor([2.5]))
        >>> batch.index.shape[1] == 2 and batch.value.item() == 2.5
        True
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    """The indices of the entries, shape ``(B, order)``, int64."""
    value: Tensor
    """The values of the entries, shape ``(B,)``, float32; NaN where unknown (in prediction only)."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Known entries of a tensor: the value at ``index[i]`` is ``value[i]``.

    Args:
        index: Shape ``(n, order)``, int64.
        value: Shape ``(n,)``, float32.
        mode_names: The names of the modes, if the data has any.
        labels: What each index of a mode stands for, a string or an int, if the data says so.

    Example:
        >>> entries = Entries(torch.tensor([[0, 1], [2, 0]]), torch.tensor([1.0, -1.0]))
        >>> len(entries), entries.take(torch.tensor([1])).index.tolist()
        (2, [[2, 0]])
    """

    index: Tensor
    value: Tensor
    mode_names: tuple[str, ...] | None = None
    labels: tuple[tuple[str | int, ...], ...] | None = None

    def __len__(self) -> int:
        return self.value.numel()

    def take(self, rows: Tensor) -> "Entries":
        """The entries of the given rows, in the order of ``rows``, shape ``(m,)``."""
        return Entries(self.index[rows], self.value[rows], self.mode_names, self.labels)


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
    index: Array, values: Array, shape: Sequence[int] | None, *, arg: str, named: Callable[[tuple[int, ...]], str] = str
) -> tuple[Entries, tuple[int, ...]]:
    """The known entries of a list of entries, in lexicographic order; equal duplicates are merged, NaN is dropped.

    Args:
        index: Shape ``(n, order)``, integers.
        values: Shape ``(n,)``.
        shape: The mode sizes; ``None`` takes the largest index of each mode plus 1.
        arg: Name of the argument, for the error.
        named: What an index is called in the error.

    Raises:
        ValueError: If an index or value is not valid, or an index occurs twice with different values.

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
            f"{converted[order][row]} at {named(tuple(index[order][row].tolist()))}; remove one of them"
        )
    kept = order[first]
    return Entries(torch.from_numpy(index[kept]), torch.from_numpy(converted[kept])), sizes


def group_rows(index: Array) -> tuple[Array, Array]:
    """The permutation that sorts rows lexicographically (stable), and the group of each sorted row.

    Args:
        index: Shape ``(n, order)``.

    Returns:
        Two arrays of shape ``(n,)``: the permutation, and the group numbers. Equal rows are a group; groups count from
        0.

    Example:
        >>> [array.tolist() for array in group_rows(np.array([[1, 0], [0, 5], [1, 0]]))]
        [[1, 0, 2], [0, 1, 1]]
    """
    order = np.lexsort(index.T[::-1])
    ranked = index[order]
    return order, np.concatenate([[0], np.cumsum((ranked[1:] != ranked[:-1]).any(axis=1))])


def cell_numbers(index: Tensor, shape: Sequence[int]) -> Array:
    """The numbers of cells in lexicographic order, of a tensor with at most 2^63 − 1 of them.

    Example:
        >>> cell_numbers(torch.tensor([[0, 2], [1, 0]]), (2, 3)).tolist()
        [2, 3]
    """
    strides = [math.prod(shape[mode + 1 :]) for mode in range(len(shape))]
    numbers: Array = index.cpu().numpy() @ np.array(strides)
    return numbers


def look_up(entries: Entries, index: Tensor) -> Tensor:
    """The values at the given indices, NaN where they are unknown. It makes no dense tensor and no flat index.

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
