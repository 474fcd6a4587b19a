"""Splits the known entries for training, validation and a held-out test."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tenzoo.data.arrays import Array
from tenzoo.data.completion.entries import Entries, cell_numbers, look_up

SPLIT_NAMES = ("train", "val", "held_out")
"""All possible splits, in their order."""

_SPLIT_STREAM = 0x5B117


def split_entries(
    entries: Entries, shape: Sequence[int], *, observed_fraction: float, validation_fraction: float, seed: int
) -> dict[str, Entries]:
    """Splits the known entries at random.

    Of the n known entries ``round(observed_fraction · n)`` are observed; of these ``round(validation_fraction ·
    observed)`` are ``val`` and the rest ``train``; all others are ``held_out``. Halves are rounded to the even number.
    The random generator depends on ``seed`` alone.

    Args:
        entries: The known entries.
        shape: The tensor's mode sizes.
        observed_fraction: Fraction in (0, 1]. 1 is allowed where the tensor has unknown cells.
        validation_fraction: Fraction in [0, 1) of the observed entries.
        seed: Chooses the split.

    Returns:
        The splits with a fraction above 0, in the order of :data:`SPLIT_NAMES`. Entries keep their order.

    Raises:
        ValueError: If nothing is left to complete, or a split has fewer than 2 entries.

    Example:
        >>> entries = Entries(torch.cartesian_prod(torch.arange(4), torch.arange(5)), torch.arange(20.0))
        >>> splits = split_entries(entries, (4, 5), observed_fraction=0.5, validation_fraction=0.2, seed=0)
        >>> {name: len(split) for name, split in splits.items()}
        {'train': 8, 'val': 2, 'held_out': 10}
    """
    if observed_fraction == 1 and len(entries) == math.prod(shape):
        raise ValueError(
            "expected less than 1 in `observed_fraction` where no entry is missing, got 1: nothing is left to complete"
        )
    num_observed = round(observed_fraction * len(entries))
    num_val = round(validation_fraction * num_observed)
    parts = {
        "train": (num_val, num_observed),
        "val": (0, num_val),
        "held_out": (num_observed, len(entries)),
    }
    wanted = {"train": True, "val": validation_fraction > 0, "held_out": observed_fraction < 1}
    row = torch.from_numpy(np.random.default_rng([seed, _SPLIT_STREAM]).permutation(len(entries)))
    splits = {}
    for name in SPLIT_NAMES:
        start, end = parts[name]
        if wanted[name] and end - start < 2:
            raise ValueError(
                f"expected at least 2 entries in the split {name!r}, got {end - start} of {len(entries)}; "
                "change `observed_fraction` or `validation_fraction`"
            )
        if wanted[name]:
            splits[name] = entries.take(row[start:end].sort().values)
    return splits


class Places:
    """Tells in which split a cell lies.

    Args:
        splits: The entries of each split, by its name.
        shape: The tensor's mode sizes.

    Example:
        >>> entries = Entries(torch.tensor([[0, 1], [2, 0]]), torch.tensor([4.0, 5.0]))
        >>> Places({"train": entries}, (3, 2)).of(torch.tensor([[2, 0], [2, 1]])).tolist()
        [1, 0]
    """

    def __init__(self, splits: Mapping[str, Entries], shape: Sequence[int]) -> None:
        self._shape = tuple(shape)
        self._index = torch.cat([splits[name].index for name in SPLIT_NAMES if name in splits])
        self._split = torch.cat(
            [
                torch.full((len(splits[name]),), number, dtype=torch.int8)
                for number, name in enumerate(SPLIT_NAMES, 1)
                if name in splits
            ]
        )
        self._number: Array | None = None
        if math.prod(self._shape) < 2**63:
            numbers = cell_numbers(self._index, self._shape)
            order = np.argsort(numbers, kind="stable")
            self._number, self._split = numbers[order], self._split[torch.from_numpy(order)]

    def of(self, index: Tensor) -> Tensor:
        """For cells ``(n, order)``: 0 for missing ones, else the number of the split in its order, from 1; int8."""
        if self._number is None:  # too many cells to number them
            return look_up(Entries(self._index, self._split.float()), index.cpu()).nan_to_num(0).to(torch.int8)
        numbers = cell_numbers(index, self._shape)
        place = np.searchsorted(self._number, numbers).clip(max=len(self._number) - 1)
        found = np.where(self._number[place] == numbers, self._split.numpy()[place], np.int8(0))
        return torch.from_numpy(found)
