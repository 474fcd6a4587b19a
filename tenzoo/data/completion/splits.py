"""Splits the known entries for training, validation and a held-out test."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from tenzoo.data.completion.entries import Entries

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
