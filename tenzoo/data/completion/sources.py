"""Sources of entries: public datasets, a synthetic sparse tensor, or the user's own file."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorly as tl
import torch
from tensorly.datasets import load_covid19_serology, load_IL2data, load_indian_pines, load_kinetic

from tenzoo.data.arrays import Array
from tenzoo.data.completion.entries import Entries, dense_entries, group_rows
from tenzoo.data.completion.entry_checks import check_shape
from tenzoo.data.completion.files import FILE_ENDINGS, SPARSE_ENDINGS, read_entries
from tenzoo.data.completion.labels import TABLE_ENDINGS, labelled_entries, read_labelled
from tenzoo.data.completion.objects import check_object, columns_of, is_frame, object_entries

SYNTHETIC_RANK = 4
SYNTHETIC_NOISE = 0.1
_SYNTHETIC_STREAM = 0x5EED  # differs from the other streams of the same seed


def _kinetic() -> Array:
    bunch = load_kinetic()  # missing entries are 0, with a mask that is True there
    values: Array = np.array(tl.to_numpy(bunch.tensor))
    values[np.asarray(tl.to_numpy(bunch.missing_values_position), dtype=bool)] = np.nan
    return values


_PUBLIC: dict[str, Callable[[], Array]] = {
    "covid": lambda: tl.to_numpy(load_covid19_serology().tensor),
    "il2": lambda: tl.to_numpy(load_IL2data().tensor),
    "indian_pines": lambda: tl.to_numpy(load_indian_pines().tensor),
    "kinetic": _kinetic,
}

DATASETS = (*sorted(_PUBLIC), "synthetic")
"""The valid names in ``dataset``; paths of files are valid too."""


def is_public(dataset: object) -> bool:
    """Whether a data set is one of :data:`DATASETS`."""
    return isinstance(dataset, str) and dataset in DATASETS


def called(dataset: object) -> str:
    """What a data set is called where it cannot be kept: its name or path, or its class."""
    return dataset if isinstance(dataset, str) else f"({type(dataset).__name__})"


@dataclass(frozen=True)
class Columns:
    """How a table is read.

    Args:
        index: Names of the columns of indices.
        value: Name of the column of values.
    """

    index: tuple[str, ...]
    value: str


def check_table(
    dataset: Any, index_columns: Sequence[str] | None, value_column: str | None, shape: object
) -> Columns | None:
    """Checks the arguments that name columns of a table, without reading it; None if there are none.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is missing, or has no meaning for this dataset.

    Example:
        >>> check_table("ratings.csv", ["user", "film"], "stars", None)
        Columns(index=('user', 'film'), value='stars')
    """
    is_table = dataset.lower().endswith(TABLE_ENDINGS) if isinstance(dataset, str) else is_frame(dataset)
    if index_columns is None and value_column is None:
        if is_table and not (isinstance(dataset, str) and dataset.lower().endswith(FILE_ENDINGS)):
            raise ValueError(
                f"expected the names of its columns in `index_columns` and `value_column` for {called(dataset)!r}, got "
                "none"
            )
        return None
    if isinstance(index_columns, str) or not isinstance(index_columns, Sequence | None):
        raise TypeError(f"expected a list of names in `index_columns`, got {index_columns!r}")
    if not isinstance(value_column, str | None):
        raise TypeError(f"expected a name in `value_column`, got {value_column!r}")
    if index_columns is None or value_column is None:
        missing, given = ("index_columns", "value_column")[:: 1 if index_columns is None else -1]
        raise ValueError(f"expected `{missing}` beside `{given}`, got None")
    names = [*index_columns, value_column]
    if len(index_columns) < 2 or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"expected two or more different names in `index_columns`, got {[*index_columns]}")
    if not is_table:
        raise ValueError(
            f"expected `index_columns` only for a table, a data frame or a file ending in {', '.join(TABLE_ENDINGS)}, "
            f"got {called(dataset)!r}"
        )
    if shape is not None:
        raise ValueError(f"expected no `shape` beside `index_columns`, got {shape}: each mode is as long as its labels")
    return Columns(tuple(index_columns), value_column)


def check_source(dataset: Any, *, shape: Sequence[int] | None, num_entries: int | None) -> tuple[int, ...] | None:
    """Checks the arguments that choose a dataset, without reading a file.

    Args:
        dataset: A name of :data:`DATASETS`, the path of a file, or data.
        shape: Mode sizes: required for ``synthetic``, optional for lists of entries, else ``None``.
        num_entries: Number of entries: required for ``synthetic``, else ``None``.

    Returns:
        The shape as a tuple of ints, if there is one.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the name is unknown, or an argument is missing or has no meaning for it.

    Example:
        >>> check_source("covid", shape=None, num_entries=None)
        >>> check_source("synthetic", shape=[9, 9], num_entries=50)
        (9, 9)
    """
    check_object(dataset)
    sizes = None if shape is None else check_shape(shape)
    if not isinstance(dataset, str):
        if shape is not None or num_entries is not None:
            raise ValueError(f"expected neither `shape` nor `num_entries` for {called(dataset)}, which has a shape")
        return None
    if dataset == "synthetic":
        return _check_synthetic(sizes, num_entries)
    ending = Path(dataset).suffix.lower()
    if dataset not in _PUBLIC and ending not in FILE_ENDINGS:
        raise ValueError(
            f"expected one of {', '.join(DATASETS)} or a file ending in {', '.join(FILE_ENDINGS)} in `dataset`, "
            f"got {dataset!r}"
        )
    if num_entries is not None:
        raise ValueError(f"expected `num_entries` only with 'synthetic', got {num_entries!r}; leave it out")
    if sizes is not None and (dataset in _PUBLIC or ending not in SPARSE_ENDINGS):
        raise ValueError(
            f"expected `shape` only with 'synthetic' and lists of entries, got {sizes} with {dataset!r}; leave it out"
        )
    return sizes


def _check_synthetic(shape: tuple[int, ...] | None, num_entries: int | None) -> tuple[int, ...]:
    if shape is None:
        raise ValueError("expected mode sizes in `shape` for 'synthetic', got None; give one size per mode")
    if num_entries is None:
        raise ValueError(
            "expected a number in `num_entries` for 'synthetic', got None; give the number of entries to draw"
        )
    if isinstance(num_entries, bool) or not isinstance(num_entries, int):
        raise TypeError(f"expected an integer in `num_entries`, got {num_entries!r}")
    if not 2 <= num_entries <= math.prod(shape):
        raise ValueError(f"expected 2 to {math.prod(shape)} (the cells of {shape}) in `num_entries`, got {num_entries}")
    return shape


def check_missing_values(values: object) -> tuple[float, ...]:
    """Checks the numbers that mean a missing value.

    Raises:
        TypeError: If they are no list of numbers.

    Example:
        >>> check_missing_values([-999]), check_missing_values(None)
        ((-999.0,), ())
    """
    if values is None:
        return ()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"expected a list of numbers in `missing_values`, got {values!r}")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise TypeError(f"expected a list of numbers in `missing_values`, got {[*values]}")
    return tuple(float(value) for value in values)


def load_entries(
    dataset: Any,
    *,
    shape: Sequence[int] | None = None,
    num_entries: int | None = None,
    seed: int = 0,
    columns: Columns | None = None,
    missing_values: Sequence[float] = (),
) -> tuple[Entries, tuple[int, ...]]:
    """The known entries of a dataset, each index once, in lexicographic order, and the tensor's shape.

    ``covid`` is systems serology ``(438, 6, 11)``, ``il2`` the IL-2 responses ``(13, 4, 12, 8)`` of which 192 are
    missing, ``kinetic`` fluorescence ``(64, 12, 10, 60)`` of which 1754 are missing, ``indian_pines`` a hyperspectral
    image ``(145, 145, 200)``; all four come with TensorLy. ``synthetic`` is :func:`synthetic_entries`.

    Args:
        dataset: A name of :data:`DATASETS`, the path of a file, see
            :func:`~tenzoo.data.completion.files.read_entries`, or data, see
            :func:`~tenzoo.data.completion.objects.object_entries`.
        shape: Mode sizes, see :func:`check_source`.
        num_entries: Number of synthetic entries.
        seed: Chooses the synthetic tensor; the others ignore it.
        columns: How a table is read, see :func:`~tenzoo.data.completion.labels.read_labelled`.
        missing_values: Numbers in a file that mean a missing value.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument or a file is not valid.
        FileNotFoundError: If there is no such file.

    Example:
        >>> entries, shape = load_entries("il2")
        >>> math.prod(shape) - len(entries)
        192
    """
    if is_frame(dataset):
        assert columns is not None
        return labelled_entries(columns_of(dataset), columns.index, columns.value, missing_values)
    if not isinstance(dataset, str):
        return object_entries(dataset, missing_values=missing_values)
    if columns is not None:
        return read_labelled(
            Path(dataset), index_columns=columns.index, value_column=columns.value, missing_values=missing_values
        )
    sizes = check_source(dataset, shape=shape, num_entries=num_entries)
    if dataset == "synthetic":
        assert sizes is not None
        assert num_entries is not None
        return synthetic_entries(sizes, num_entries, seed=seed), sizes
    if dataset in _PUBLIC:
        return dense_entries(_PUBLIC[dataset](), arg="dataset")
    return read_entries(Path(dataset), sizes, missing_values=missing_values)


def synthetic_entries(shape: tuple[int, ...], num_entries: int, *, seed: int) -> Entries:
    """Noisy samples of a low-rank tensor, in memory proportional to their number and not to the tensor.

    The signal ``Σ_r Π_k F_k[i_k, r]`` has CP rank 4 and factors drawn from N(1, 1), divided by its
    standard deviation over the sampled entries; the noise is normal with standard deviation 0.1. No method is known to
    recover a signal of factors with mean 0 from so few entries; factors with mean 1 add a trend along each mode, as in
    real data. The indices are a uniform sample without repetition.

    Args:
        shape: Mode sizes.
        num_entries: Number of samples, at most the number of cells.
        seed: Chooses factors, indices and noise.

    Example:
        >>> entries = synthetic_entries((10**5, 10**5, 10**3), 1000, seed=0)
        >>> entries.index.shape, 0.9 < entries.value.std() < 1.1
        (torch.Size([1000, 3]), tensor(True))
    """
    generator = np.random.default_rng([seed, _SYNTHETIC_STREAM])
    index = _distinct_rows(shape, num_entries, generator)
    signal = np.ones((num_entries, SYNTHETIC_RANK), dtype=np.float32)
    for column in index.T:
        rows, position = np.unique(column, return_inverse=True)  # draws the factor rows that are needed
        signal *= 1 + generator.standard_normal((len(rows), SYNTHETIC_RANK), dtype=np.float32)[position]
    value = signal.sum(axis=1)
    value /= value.std()
    value += SYNTHETIC_NOISE * generator.standard_normal(num_entries, dtype=np.float32)
    return Entries(torch.from_numpy(index), torch.from_numpy(value))


def _distinct_rows(shape: tuple[int, ...], count: int, generator: np.random.Generator) -> Array:
    cells = math.prod(shape)
    if 2 * count > cells:
        flat = np.sort(generator.permutation(cells)[:count])
        return np.stack(np.unravel_index(flat, shape), axis=1).astype(np.int64)
    index = np.empty((0, len(shape)), dtype=np.int64)
    while len(index) < count:  # draws as many as are missing, so the sample is uniform
        drawn = [generator.integers(size, size=count - len(index)) for size in shape]
        index = np.concatenate([index, np.stack(drawn, axis=1)])
        order, group = group_rows(index)
        index = index[order[np.flatnonzero(np.diff(group, prepend=-1))]]
    return index
