"""Makes checked and split data, with a fingerprint, from the arguments of a completion data module."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tenzoo.data.completion.entries import Entries
from tenzoo.data.completion.files import INDEX_ENDINGS, read_index
from tenzoo.data.completion.labels import read_labels
from tenzoo.data.completion.sources import DATASETS, Columns, load_entries
from tenzoo.data.completion.splits import split_entries

BENCHMARK_FRACTION = 0.3
"""Fraction of the known entries of a public data set that is observed, unless one is given."""

HELD_OUT = "held_out"
"""The split that ``predict_index`` may name instead of a file."""


@dataclass(frozen=True, eq=False)
class PreparedData:
    """All that is known once the data is loaded.

    Args:
        known: Every known entry.
        shape: Mode sizes of the tensor.
        splits: The non-empty splits of ``known``, by name.
        location: The number to subtract from values, in their unit.
        scale: The number to divide values by, in their unit.
        predict_index: Indices to predict, shape ``(m, order)``, if the user chose some.
        fingerprint: Builtins that tell this data and split from any other.
    """

    known: Entries
    shape: tuple[int, ...]
    splits: dict[str, Entries]
    location: float
    scale: float
    predict_index: Tensor | None
    fingerprint: dict[str, Any]


def prepare(
    dataset: str,
    *,
    observed_fraction: float | None,
    validation_fraction: float,
    seed: int,
    standardize: bool,
    shape: Sequence[int] | None,
    num_entries: int | None,
    predict_index: str | None,
    columns: Columns | None = None,
    missing_values: Sequence[float] = (),
) -> PreparedData:
    """Loads, checks and splits. For the arguments see :class:`tenzoo.data.CompletionDataModule`.

    Raises:
        ValueError: If a file is not valid, a split has fewer than 2 entries, or constant values are to be standardized.
        FileNotFoundError: If there is no such file.

    Example:
        >>> options = {"standardize": False, "shape": None, "num_entries": None, "predict_index": None}
        >>> data = prepare("il2", observed_fraction=0.5, validation_fraction=0.0, seed=1, **options)
        >>> sum(len(split) for split in data.splits.values()) == len(data.known)
        True
    """
    known, sizes = load_entries(
        dataset, shape=shape, num_entries=num_entries, seed=seed, columns=columns, missing_values=missing_values
    )
    if observed_fraction is None:
        observed_fraction = BENCHMARK_FRACTION if dataset in DATASETS else 1.0
        _check_something_missing(dataset, known, sizes, observed_fraction)
    splits = split_entries(
        known, sizes, observed_fraction=observed_fraction, validation_fraction=validation_fraction, seed=seed
    )
    location, scale = moments(splits["train"].value) if standardize else (0.0, 1.0)
    fingerprint = {
        "dataset": dataset if dataset in DATASETS else Path(dataset).name,  # files may move to another folder
        "shape": list(sizes),
        "seed": seed,
        "observed_fraction": observed_fraction,
        "validation_fraction": validation_fraction,
        "standardize": standardize,
        "num_entries": {name: len(split) for name, split in splits.items()},
        "checksum": {name: checksum(split) for name, split in splits.items()},
    }
    if known.labels is not None:
        fingerprint["labels"] = dict(zip(known.mode_names or (), map(list, known.labels), strict=True))
    chosen = _chosen_index(predict_index, splits, sizes)
    return PreparedData(known, sizes, splits, location, scale, chosen, fingerprint)


def _check_something_missing(dataset: str, known: Entries, shape: tuple[int, ...], observed_fraction: float) -> None:
    if observed_fraction < 1 or len(known) < math.prod(shape):
        return
    zeros = int((known.value == 0).sum())
    raise ValueError(
        f"expected a number in (0, 1) in `observed_fraction` for {dataset!r}, whose {' × '.join(map(str, shape))} "
        f"cells are all known{f' ({zeros} of them 0)' if zeros else ''}, got None; write NaN where a value is missing, "
        "write a list of entries as .csv, or set `observed_fraction` to the fraction to train on"
    )


def summary(dataset: str, data: PreparedData) -> str:
    """One line on the data of a file and its splits.

    Example:
        >>> options = {"standardize": False, "shape": None, "num_entries": None, "predict_index": None}
        >>> data = prepare("il2", observed_fraction=0.5, validation_fraction=0.0, seed=1, **options)
        >>> summary("x", data).removesuffix(" to train on, 0 to validate, 2400 held out")
        "'x': 13 × 4 × 12 × 8 cells, 4800 known (96.2 %) from 0 to 1, 828 of them 0: 2400"
    """
    cells, count = math.prod(data.shape), len(data.known)
    size = {name: len(split) for name, split in data.splits.items()}
    value = data.known.value
    zeros = int((value == 0).sum())
    lengths = list(map(str, data.shape))
    if data.known.labels is not None and data.known.mode_names is not None:
        lengths = [f"{length} {name}" for length, name in zip(lengths, data.known.mode_names, strict=True)]
    line = (
        f"{dataset!r}: {' × '.join(lengths)} cells, {count} known ({100 * count / cells:.3g} %) "
        f"from {value.min():.6g} to {value.max():.6g}{f', {zeros} of them 0' if zeros else ''}: "
        f"{size['train']} to train on, {size.get('val', 0)} to validate, {size.get(HELD_OUT, 0)} held out"
    )
    trained = data.splits["train"].index.numpy()
    without = [
        f"{lacking} of {length} of mode {mode}"
        for mode, length in enumerate(data.shape)
        if (lacking := length - len(np.unique(trained[:, mode])))
    ]
    return f"{line}; no training entries, so predictions have no meaning, at {', '.join(without)}" if without else line


def _chosen_index(predict_index: str | None, splits: dict[str, Entries], shape: tuple[int, ...]) -> Tensor | None:
    if predict_index is None:
        return None
    if predict_index != HELD_OUT:
        if splits["train"].labels is not None:
            return read_labels(Path(predict_index), splits["train"])
        return read_index(Path(predict_index), shape, names=splits["train"].mode_names)
    if HELD_OUT not in splits:
        raise ValueError(
            f"expected a path or None in `predict_index` where nothing is held out, got {predict_index!r}; leave it out"
        )
    return splits[HELD_OUT].index


def moments(value: Tensor) -> tuple[float, float]:
    """Mean and population standard deviation, computed in float64.

    Raises:
        ValueError: If all values are the same.

    Example:
        >>> moments(Tensor([1.0, 3.0]))
        (2.0, 1.0)
    """
    if value.min() == value.max():
        raise ValueError(
            f"expected training values that differ for `standardize`, got {len(value)} times {value[0].item()}; "
            "set it to false"
        )
    return value.double().mean().item(), value.double().std(correction=0).item()


def checksum(entries: Entries) -> str:
    """A hexadecimal digest of indices and values, in their order.

    Example:
        >>> entries = Entries(Tensor([[0, 1], [1, 0]]).long(), Tensor([1.0, 2.0]))
        >>> checksum(entries) == checksum(entries.take(Tensor([1, 0]).long()))
        False
    """
    digest = hashlib.blake2b(entries.index.numpy().tobytes(), digest_size=16)
    digest.update(entries.value.numpy().tobytes())
    return digest.hexdigest()


def check_predict_index(predict_index: object) -> None:
    """Checks what to predict, without reading a file.

    Raises:
        TypeError: If it is neither a string nor ``None``.
        ValueError: If its ending is not supported.

    Example:
        >>> check_predict_index("wanted.csv")
    """
    if predict_index is None or predict_index == HELD_OUT:
        return
    if not isinstance(predict_index, str):
        raise TypeError(f"expected a path as str in `predict_index`, got {predict_index!r}")
    if Path(predict_index).suffix.lower() not in INDEX_ENDINGS:
        raise ValueError(
            f"expected a file ending in {' or '.join(INDEX_ENDINGS)}, or {HELD_OUT!r}, in `predict_index`, got "
            f"{predict_index!r}"
        )
