"""What is printed of a user's data before training: its size, its values, its splits, and what looks odd."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tenzoo.data.completion.entries import Entries

_OFTEN = 0.05
"""A value at the end of the range that is more frequent may mark what is missing, or be where a scale ends."""

_GRADES = 12
"""Of a scale with so few grades each is frequent."""


def summary(dataset: str, known: Entries, shape: Sequence[int], splits: Mapping[str, Entries]) -> str:
    """A few lines on data and its splits.

    Args:
        dataset: What it is called.
        known: All known entries.
        shape: Mode sizes.
        splits: The entries of ``train``, ``val`` and ``held_out``, without those that are empty.

    Example:
        >>> import torch
        >>> known = Entries(torch.tensor([[0, 0], [1, 0], [2, 0]]), torch.tensor([1.0, 2.0, 6.0]), ("user", "film"))
        >>> print(summary("x.csv", known, (3, 2), {"train": known}))
        x.csv: 3 user × 2 film = 6 cells
          known   3 (50 %): 3 to train on, 0 to validate, 0 held out
          values  1 to 6, mean 3, standard deviation 2.16
          note    no training entries, so predictions have no meaning, at 1 of 2 of mode 1 (film)
    """
    cells, count, value = math.prod(shape), len(known), known.value.numpy()
    names = known.mode_names or ("",) * len(shape)
    lengths = " × ".join(f"{size} {name}".rstrip() for size, name in zip(shape, names, strict=True))
    size = {name: len(split) for name, split in splits.items()}
    zeros = int((value == 0).sum())
    mean, std = value.mean(dtype=np.float64), value.std(dtype=np.float64)
    lines = [
        f"{dataset}: {lengths} = {cells} cells",
        f"  known   {count} ({100 * count / cells:.3g} %): {size['train']} to train on, {size.get('val', 0)} to "
        f"validate, {size.get('held_out', 0)} held out",
        f"  values  {value.min():.6g} to {value.max():.6g}, mean {mean:.6g}, standard deviation {std:.3g}"
        f"{f', {zeros} of them 0' if zeros else ''}",
    ]
    return "\n".join([*lines, *(f"  note    {note}" for note in _notes(known, shape, splits["train"], names))])


def _notes(known: Entries, shape: Sequence[int], train: Entries, names: Sequence[str]) -> Iterator[str]:
    value, counts = np.unique(known.value.numpy(), return_counts=True)
    if len(value) == 1:
        yield f"all values are {value[0]:.6g}"
    for end, place in (("smallest", 0), ("largest", -1)):
        share = counts[place] / counts.sum()
        if len(value) > _GRADES and share > _OFTEN:
            yield (
                f"{100 * share:.3g} % of the values are {value[place]:.6g}, the {end}; if it marks missing ones, name "
                "it in `missing_values`"
            )
    modes = [f"mode {mode}{f' ({name})' if name else ''}" for mode, name in enumerate(names)]
    for mode, length in zip(modes, shape, strict=True):
        if length == 1:
            yield f"{mode} has one index, and so says nothing"
    index = train.index.numpy()
    without = [
        f"{lacking} of {length} of {mode}"
        for column, (mode, length) in enumerate(zip(modes, shape, strict=True))
        if (lacking := length - len(np.unique(index[:, column])))
    ]
    if without:
        yield f"no training entries, so predictions have no meaning, at {', '.join(without)}"
