"""From the arguments of a completion data module to checked, split data with a fingerprint."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tenzoo.data.entries import Entries
from tenzoo.data.files import INDEX_ENDINGS, read_index
from tenzoo.data.sources import DATASETS, load_entries
from tenzoo.data.splits import split_entries


@dataclass(frozen=True, eq=False)
class PreparedData:
    """All that is known once the data is loaded.

    Args:
        known: Every known entry.
        shape: Mode sizes of the tensor.
        splits: The non-empty splits of ``known``, by name.
        location: What to subtract from values, in their unit.
        scale: What to divide values by, in their unit.
        wanted: Indices to predict, shape ``(m, order)``, if the user gave some.
        fingerprint: Builtins that tell this data and split from any other.
    """

    known: Entries
    shape: tuple[int, ...]
    splits: dict[str, Entries]
    location: float
    scale: float
    wanted: Tensor | None
    fingerprint: dict[str, Any]


def prepare(
    dataset: str,
    *,
    observed_fraction: float,
    validation_fraction: float,
    seed: int,
    standardize: bool,
    shape: Sequence[int] | None,
    num_entries: int | None,
    predict_index: str | None,
) -> PreparedData:
    """Loads, checks and splits. The arguments are those of :class:`tenzoo.data.CompletionDataModule`.

    Raises:
        ValueError: If a file is not valid, a split has fewer than 2 entries, or constant values are to be standardized.
        FileNotFoundError: If there is no such file.

    Example:
        >>> options = {"standardize": False, "shape": None, "num_entries": None, "predict_index": None}
        >>> data = prepare("il2", observed_fraction=0.5, validation_fraction=0.0, seed=1, **options)
        >>> sum(len(split) for split in data.splits.values()) == len(data.known)
        True
    """
    known, sizes = load_entries(dataset, shape=shape, num_entries=num_entries, seed=seed)
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
    wanted = None if predict_index is None else read_index(Path(predict_index), sizes)
    return PreparedData(known, sizes, splits, location, scale, wanted, fingerprint)


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
            "turn it off"
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
    """Checks the path of a file of indices, without reading it.

    Raises:
        TypeError: If it is neither a string nor ``None``.
        ValueError: If its ending is not supported.

    Example:
        >>> check_predict_index("wanted.csv")
    """
    if predict_index is None:
        return
    if not isinstance(predict_index, str):
        raise TypeError(f"expected a path as str in `predict_index`, got {predict_index!r}; give a string")
    if Path(predict_index).suffix.lower() not in INDEX_ENDINGS:
        raise ValueError(
            f"expected a file ending in {' or '.join(INDEX_ENDINGS)} in `predict_index`, got {predict_index!r}; "
            "convert it"
        )
