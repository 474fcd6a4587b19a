"""Makes checked and split data, with a fingerprint, from the arguments of a completion data module."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from tenzoo.data.completion.entries import Entries
from tenzoo.data.completion.files import INDEX_ENDINGS, read_index
from tenzoo.data.completion.labels import read_labels
from tenzoo.data.completion.sources import Columns, called, is_public, load_entries
from tenzoo.data.completion.splits import Places, split_entries

_BENCHMARK = (0.3, 0.1)
"""Observed fraction, and fraction of it for validation, of the data sets with a name, unless they are given."""

_OWN = (0.9, 1 / 9)
"""Those of a file: 80 % of the known entries to train on, 10 % to validate, 10 % held out."""

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

    @cached_property
    def places(self) -> Places:
        """The splits of cells."""
        return Places(self.splits, self.shape)


def prepare(
    dataset: Any,
    *,
    observed_fraction: float | None,
    validation_fraction: float | None,
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
    if observed_fraction is None and not is_public(dataset):
        _check_something_missing(called(dataset), known, sizes)
    observed_fraction, validation_fraction = _fractions(dataset, observed_fraction, validation_fraction)
    splits = split_entries(
        known, sizes, observed_fraction=observed_fraction, validation_fraction=validation_fraction, seed=seed
    )
    location, scale = moments(splits["train"].value) if standardize else (0.0, 1.0)
    fingerprint = {
        "dataset": Path(dataset).name
        if isinstance(dataset, str)
        else called(dataset),  # files may move to another folder
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


def _fractions(dataset: object, observed: float | None, validation: float | None) -> tuple[float, float]:
    """The fractions of a split, those given and the defaults."""
    own = not is_public(dataset) and observed is None
    usual = _OWN if own else _BENCHMARK
    return usual[0] if observed is None else observed, usual[1] if validation is None else validation


def _check_something_missing(dataset: str, known: Entries, shape: tuple[int, ...]) -> None:
    if len(known) < math.prod(shape):
        return
    zeros = int((known.value == 0).sum())
    raise ValueError(
        f"expected a number in (0, 1) in `observed_fraction` for {dataset!r}, whose {' × '.join(map(str, shape))} "
        f"cells are all known{f' ({zeros} of them 0)' if zeros else ''}, got None; write NaN where a value is missing, "
        "write a list of entries as .csv, or set `observed_fraction` to the fraction to train on"
    )


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
