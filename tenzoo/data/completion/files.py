"""Entries and indices from the user's own files. Nothing in them is ever executed: no pickles, no code."""

import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from tenzoo.data.arrays import Array, ContentError, TooLargeError, check_inflation, read_npy, read_npz
from tenzoo.data.completion.ambiguity import (
    check_columns,
    check_last_columns,
    check_no_times,
    check_numbering,
    check_same_columns,
    is_rating,
)
from tenzoo.data.completion.csv_files import Table, csv_fault, parse_csv
from tenzoo.data.completion.entries import Entries, sparse_entries
from tenzoo.data.completion.entry_checks import check_index, check_shape
from tenzoo.data.completion.missing_values import check_markers, without_markers
from tenzoo.data.completion.objects import object_entries, read_mat, read_netcdf
from tenzoo.weight_files import OversizedError, load_torch

FILE_ENDINGS = (".csv", ".mat", ".nc", ".npy", ".npz", ".pt")
INDEX_ENDINGS = (".csv", ".npz")
SPARSE_ENDINGS = (".csv", ".npz")
_NO_VALUES = ("indices", "shape")
"""Arrays of an ``.npz`` file that hold no values."""

T = TypeVar("T")


def read_entries(
    path: Path, shape: Sequence[int] | None, *, missing_values: Sequence[float] = (), arg: str = "dataset"
) -> tuple[Entries, tuple[int, ...]]:
    r"""The known entries of a file, and the tensor's shape.

    Ambiguous files are refused: indices that count from 1 or are ids, a column of row numbers, zeros in a dense array
    of integers, markers of missing values such as −999, times after the values, decimal commas, and a first line such
    as 0,1,2,3, which may number the columns. A ``shape`` makes indices unambiguous, and a header the columns.

    Args:
        path: A dense tensor with NaN for missing entries (``.npy``, ``.npz`` with one array, ``.pt`` with one
            tensor, which may be sparse, ``.mat`` and ``.nc`` with one array), or a list of entries (``.npz`` with
            ``indices``, ``values`` and possibly ``shape``; ``.csv``, separated by commas, whose last column is the
            value and whose other columns are the indices, with or without a header line).
        shape: The mode sizes of a list of entries; ``None`` takes those of the file, else the largest index plus 1.
        missing_values: Numbers that mean a missing value.
        arg: Name of the argument, for the errors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, is ambiguous, or its content does not match its ending.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "ratings.csv"
        >>> _ = path.write_text("user,film,stars\n0,1,4\n2,0,5\n")
        >>> entries, shape = read_entries(path, None)
        >>> entries.value.tolist(), shape
        ([4.0, 5.0], (3, 2))
        >>> entries.mode_names
        ('user', 'film')
    """
    match path.suffix.lower():
        case ".npy":
            return object_entries(_read(path, read_npy, arg), missing_values=missing_values, arg=arg)
        case ".pt":
            return object_entries(_read(path, _parse_pt, arg), missing_values=missing_values, arg=arg)
        case ".mat":
            return object_entries(_read(path, read_mat, arg), missing_values=missing_values, arg=arg)
        case ".nc":
            return object_entries(_read(path, read_netcdf, arg), missing_values=missing_values, arg=arg)
        case ".csv":
            table = _table(path, arg)
            check_columns(table.names, arg=arg)
            check_no_times(table.numbers[:, -1], table.names, arg=arg)
            values = without_markers(table.numbers[:, -1], missing_values)
            entries, sizes = _sparse(table.numbers[:, :-1], values, shape, table.names, arg)
            if table.names is not None:
                return replace(entries, mode_names=tuple(table.names[:-1])), sizes
            if shape is None:
                check_last_columns(table.numbers, padded=table.padded, arg=arg)
            return entries, sizes
        case ".npz":
            arrays = _read(path, read_npz, arg)
            for name in set(arrays).difference(_NO_VALUES):
                arrays[name] = without_markers(arrays[name], missing_values)
            return _npz_entries(arrays, shape, arg)
    raise ValueError(f"expected a file ending in {', '.join(FILE_ENDINGS)} in `{arg}`, got {str(path)!r}")


def read_index(
    path: Path, shape: Sequence[int], *, names: Sequence[str] | None = None, arg: str = "predict_index"
) -> torch.Tensor:
    r"""The indices of a file, in its order and with its repetitions.

    Args:
        path: A ``.csv`` with one column per mode, or an ``.npz`` with one array or an array ``indices``.
        shape: The mode sizes that they must fit.
        names: The names of the modes, if there are any: a header must have the same.
        arg: Name of the argument, for the errors.

    Returns:
        Shape ``(n, order)``, int64.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, the indices do not fit the shape, or a header has other names.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "wanted.csv"
        >>> _ = path.write_text("2,0\n0,1\n")
        >>> read_index(path, (3, 2)).tolist()
        [[2, 0], [0, 1]]
    """
    match path.suffix.lower():
        case ".csv":
            table = _table(path, arg)
            if table.names is not None and names is not None:
                check_same_columns(table.names, names, arg=arg)
            index = table.numbers
        case ".npz":
            arrays = _read(path, read_npz, arg)
            if len(arrays) != 1 and "indices" not in arrays:
                raise ValueError(
                    f"expected one array or an array `indices` in `{arg}`, got {sorted(arrays)}; name it `indices`"
                )
            index = arrays.get("indices", next(iter(arrays.values())))
        case ending:
            raise ValueError(f"expected a file ending in .csv or .npz in `{arg}`, got {ending!r}")
    return torch.from_numpy(check_index(index, shape, arg=arg)[0])


def _table(path: Path, arg: str) -> Table:
    table = _read(path, parse_csv, arg)
    if table.numbered:
        line = ",".join(map(str, range(table.numbers.shape[1])))
        raise ValueError(
            f"expected names or data in line 1 of {str(path)!r} in `{arg}`, got {line!r}, which may be either; remove "
            "the line if it numbers the columns, or write a line of names above it if it is data"
        )
    return table


def _read(path: Path, parse: Callable[[Path], T], arg: str) -> T:
    if not path.is_file():
        raise FileNotFoundError(f"expected an existing file in `{arg}`, got {str(path)!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"expected a file with data in `{arg}`, got the empty {str(path)!r}; write it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parse(path)
    except (OversizedError, ContentError, ImportError):
        raise
    except TooLargeError as error:
        raise ValueError(f"expected a file that fits into memory in `{arg}`, got {error}") from None
    except Exception as error:  # the parsers raise a dozen types on broken files
        if path.suffix.lower() == ".csv" and (fault := csv_fault(path)):
            raise ValueError(f"expected {fault[0]} of {str(path)!r} in `{arg}`, got {fault[1]}") from error
        raise ValueError(
            f"expected a readable {path.suffix.lower()} file of plain numbers in `{arg}`, got {str(path)!r} "
            f"({type(error).__name__}); check that it is complete and holds no Python objects"
        ) from error


def _parse_pt(path: Path) -> torch.Tensor:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_inflation(archive, path.stat().st_size)
    loaded = load_torch(path, "a .pt file of plain numbers in `dataset`")
    if not isinstance(loaded, torch.Tensor):
        raise ContentError(
            f"expected one tensor in `dataset`, got {type(loaded).__name__}; save it by torch.save(tensor, path)"
        )
    return loaded


def _sparse(
    index: Array, values: Array, shape: Sequence[int] | None, names: list[str] | None, arg: str
) -> tuple[Entries, tuple[int, ...]]:
    entries, sizes = sparse_entries(index, values, shape, arg=arg)
    check_markers(values, arg=arg, rated=is_rating(names))
    if shape is None:
        check_numbering(entries.index.numpy(), names, arg=arg)
    return entries, sizes


def _npz_entries(arrays: dict[str, Array], shape: Sequence[int] | None, arg: str) -> tuple[Entries, tuple[int, ...]]:
    if {"indices", "values"} <= set(arrays) <= {"indices", "values", "shape"}:
        own = _own_shape(arrays["shape"], arg) if "shape" in arrays else None
        if own is not None and shape is not None and own != tuple(shape):
            raise ValueError(
                f"expected the shape of the file in `shape`, got {tuple(shape)} where `{arg}` says {own}; leave one out"
            )
        return _sparse(arrays["indices"], arrays["values"], shape if own is None else own, None, arg)
    if len(arrays) != 1 or {"indices", "values"} & set(arrays):
        raise ValueError(
            f"expected one array, or `indices` and `values` (and `shape`), in `{arg}`, got {sorted(arrays)}; "
            "use these names"
        )
    if shape is not None:
        raise ValueError(f"expected no `shape` for the dense file in `{arg}`, got {tuple(shape)}; leave it out")
    return object_entries(next(iter(arrays.values())), arg=arg)


def _own_shape(array: Array, arg: str) -> tuple[int, ...]:
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"expected a row of integers as `shape` in `{arg}`, got {array.dtype} of {array.shape}; write one size "
            "per mode"
        )
    return check_shape([int(size) for size in array], arg=arg)
