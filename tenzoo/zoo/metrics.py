"""Logged metrics, such as ``"held_out/r2"``, as a table of splits."""

from collections.abc import Mapping

TITLES = {"val": "validation", "held_out": "held out"}
"""What splits are called, where that is not their name."""


def by_split(metrics: Mapping[str, float]) -> tuple[list[str], dict[str, list[float | None]]]:
    """The names of metrics, and for the title of each split their values; None where a split has none.

    Example:
        >>> by_split({"train/r2": 0.9, "val/r2": 0.8, "val/rmse": 0.1})
        (['r2', 'rmse'], {'train': [0.9, None], 'validation': [0.8, 0.1]})
    """
    names = list(dict.fromkeys(key.partition("/")[2] for key in metrics))
    splits = dict.fromkeys(key.partition("/")[0] for key in metrics)
    return names, {TITLES.get(split, split): [metrics.get(f"{split}/{name}") for name in names] for split in splits}
