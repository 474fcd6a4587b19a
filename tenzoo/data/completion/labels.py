"""Tables whose columns have names, and whose modes have labels: users, films, dates, ids with gaps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenzoo.data.arrays import Array
from tenzoo.data.checks import MISSING_TABLES
from tenzoo.data.completion.entries import Entries, sparse_entries
from tenzoo.data.completion.missing_values import check_markers, without_markers

TABLE_ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet", ".feather", ".arrow")
"""Files that are tables, once their columns are named."""

_UNKNOWN = frozenset({"", "na", "n/a", "nan", "null", "none", "-", "?"})
"""Texts of a value that is missing, in lower case."""

Label = str | int


def read_labelled(
    path: Path,
    *,
    index_columns: Sequence[str],
    value_column: str,
    missing_values: Sequence[float] = (),
    arg: str = "dataset",
) -> tuple[Entries, tuple[int, ...]]:
    """The known entries of a table, and the shape of the tensor.

    A column of indices may hold anything. Its different labels are numbered from 0 on in their order: that of numbers
    if all are integers, else that of their texts. The numbers of a mode are as many as its labels, however large these
    are.

    Args:
        path: The table.
        index_columns: Names of the columns that say where an entry is, one for each mode.
        value_column: Name of the column of values.
        missing_values: Numbers that mean a missing value, such as −999.
        arg: Name of the argument, for the errors.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If the table has no such column, a label is missing, a value is no number, or a cell has two values.
    """
    return labelled_entries(
        _read(path, [*index_columns, value_column], arg), index_columns, value_column, missing_values, arg=arg
    )


def labelled_entries(
    table: Mapping[str, Array],
    index_columns: Sequence[str],
    value_column: str,
    missing_values: Sequence[float] = (),
    *,
    arg: str = "dataset",
) -> tuple[Entries, tuple[int, ...]]:
    """As :func:`read_labelled`, of columns by their names."""
    _check_columns(table, [*index_columns, value_column], arg)
    codes, labels = zip(*(_numbered(table[name], name, arg) for name in index_columns), strict=True)
    values = without_markers(_values(table[value_column], value_column, arg), missing_values)
    check_markers(values, arg=arg)

    def named(index: tuple[int, ...]) -> str:
        where = zip(index_columns, labels, index, strict=True)
        return ", ".join(f"{name} {known[code]}" for name, known, code in where)

    entries, shape = sparse_entries(
        np.stack(codes, axis=1), values, [len(each) for each in labels], arg=arg, named=named
    )
    return Entries(entries.index, entries.value, tuple(index_columns), tuple(labels)), shape


def read_labels(path: Path, known: Entries, *, arg: str = "predict_index") -> torch.Tensor:
    """The indices of the labels in a table, in its order.

    Args:
        path: A table with a column for each mode.
        known: Entries with names of modes and labels.
        arg: Name of the argument, for the errors.

    Returns:
        Shape ``(n, order)``, int64.

    Raises:
        ImportError: As :func:`read_labelled`.
        ValueError: If a column is missing, or a label is not among those of the data.
    """
    assert known.mode_names is not None
    assert known.labels is not None
    table = _read(path, known.mode_names, arg)
    _check_columns(table, known.mode_names, arg)
    columns = []
    for name, labels in zip(known.mode_names, known.labels, strict=True):
        place = {str(label): number for number, label in enumerate(labels)}
        texts = [str(label).strip() for label in _dates(table[name])]
        for row, text in enumerate(texts, 1):
            if text not in place:
                raise ValueError(
                    f"expected one of the {len(labels)} labels of {name!r} in `{arg}`, got {text!r} in row {row}"
                )
        columns.append(np.array([place[text] for text in texts], dtype=np.int64))
    return torch.from_numpy(np.stack(columns, axis=1))


def _read(path: Path, columns: Sequence[str], arg: str) -> dict[str, Array]:
    """All columns: of texts, or of the types that the file says; the names tell what separates them."""
    if not path.is_file():
        raise FileNotFoundError(f"expected an existing file in `{arg}`, got {str(path)!r}")
    try:
        import pyarrow
        from pyarrow import csv, feather, parquet
    except ImportError as error:
        raise ImportError(
            f"expected pyarrow to read {str(path)!r} in `{arg}`, got no such package; {MISSING_TABLES}"
        ) from error
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            table = parquet.read_table(path)
        elif name.endswith((".feather", ".arrow")):
            table = feather.read_table(path)
        else:
            separator = "\t" if ".tsv" in name else _separator(path, columns)
            parse = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
            with csv.open_csv(path, parse_options=parse) as file:
                names = file.schema.names
            texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False)
            table = csv.read_csv(path, parse_options=parse, convert_options=texts)  # refuses rows of another length
    except (pyarrow.ArrowException, OSError, ValueError, EOFError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"expected a table in `{arg}`, got {str(path)!r}, which cannot be read: {said}") from error
    found = [each.strip() for each in table.column_names]
    for each in found:
        if found.count(each) > 1:
            raise ValueError(f"expected one column {each!r} in `{arg}`, got {', '.join(found)}")
    return {each: column.to_numpy(zero_copy_only=False) for each, column in zip(found, table.columns, strict=True)}


def _check_columns(table: Mapping[str, Array], names: Sequence[str], arg: str) -> None:
    for name in names:
        if name not in table:
            raise ValueError(f"expected a column {name!r} in `{arg}`, got {', '.join(table)}")


def _separator(path: Path, columns: Sequence[str]) -> str:
    """Of a file whose first line names the columns: the sign at which they come apart."""
    import gzip

    zipped = path.suffix.lower() == ".gz"
    with gzip.open(path, "rt", encoding="utf-8-sig") if zipped else path.open(encoding="utf-8-sig") as file:
        first = file.readline()
    for sign in (",", ";", "\t", "|"):
        if set(columns) <= {part.strip().strip('"') for part in first.rstrip("\r\n").split(sign)}:
            return sign
    return ","


def _numbered(column: Array, name: str, arg: str) -> tuple[Array, tuple[Label, ...]]:
    """Each row's number, and the label of each number."""
    texts = [str(label).strip() for label in _dates(column)]
    for row, (label, text) in enumerate(zip(column, texts, strict=True), 1):
        if not text or _is_missing(label):
            raise ValueError(f"expected a label in column {name!r} of `{arg}` in each row, got none in row {row}")
    labels: list[Label] = sorted(set(texts))
    if all(map(_is_whole, labels)):
        labels = sorted(map(int, labels))
    place = {str(label): number for number, label in enumerate(labels)}
    return np.array([place[text] for text in texts], dtype=np.int64), tuple(labels)


def labels_of(column: Array) -> list[Label]:
    """A label for each number: itself if all are integers, else its text.

    Example:
        >>> labels_of(np.array(["2024-01-01", "2024-01-02"], dtype="datetime64[ns]"))
        ['2024-01-01', '2024-01-02']
    """
    texts = [str(label).strip() for label in _dates(column)]
    return [int(text) for text in texts] if all(map(_is_whole, texts)) else list(texts)


def _dates(column: Array) -> Array:
    """Times as texts, no longer than they must be."""
    return np.datetime_as_string(column, unit="auto") if column.dtype.kind == "M" else column


def _is_missing(value: Any) -> bool:
    """None, and what differs from itself: NaN, and the missing times of NumPy and pandas."""
    return value is None or bool(value != value)


def _is_whole(label: Label) -> bool:
    """Whether a text is how an integer is written: neither 007 nor 1.0."""
    text = str(label)
    return text.removeprefix("-").isdecimal() and text.isascii() and str(int(text)) == text


def _values(column: Array, name: str, arg: str) -> Array:
    if column.dtype.kind in "iuf":
        return column.astype(np.float64)
    values = np.full(len(column), np.nan)
    for row, value in enumerate(column):
        text = str(value).strip()
        if _is_missing(value) or text.lower() in _UNKNOWN:
            continue
        try:
            values[row] = float(text)
        except ValueError:
            raise ValueError(f"expected numbers in column {name!r} of `{arg}`, got {text!r} in row {row + 1}") from None
    return values
