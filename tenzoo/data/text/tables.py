"""Tables of texts and labels: TSV, CSV, JSON lines and Parquet files, and data sets of the hub."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenzoo.data.checks import MISSING_EXTRA

_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*)?(:[\w.-]+)?")

_HUB_SPLITS = {"train": "train", "validation": "validation", "test": "test", "predict": "test"}


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of named cells.

    Args:
        columns: The cells of each column, by its name.
        source: Where it comes from, for errors.
        first: Number of the first row, for errors.
        unit: What the rows are called in errors.
        class_names: Names of the classes of a column, in the order of their numbers, where the source states them.
    """

    columns: dict[str, list[Any]]
    source: str
    first: int = 1
    unit: str = "row"
    class_names: Mapping[str, list[str]] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str, *, arg: str) -> list[Any]:
        """The cells of a column.

        Args:
            name: Of the column.
            arg: The argument that names the column, for the error.

        Raises:
            ValueError: If there is no such column.
        """
        if name not in self.columns:
            raise ValueError(f"expected a column of {self.source} in `{arg}`, of {list(self.columns)}, got {name!r}")
        return self.columns[name]

    def place(self, row: int) -> str:
        """Where a row is, for errors."""
        return f"{self.unit} {self.first + row} of {self.source}"


def brief(error: Exception) -> str:
    r"""The text of a library's error in one line, of at most 200 characters.

    Example:
        >>> brief(OSError("no such\nname"))
        'no such name'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


def read_table(source: str, *, arg: str) -> Table:
    """The table of a file, or of a data set of the hub.

    Args:
        source: A path that ends in ``.tsv``, ``.csv``, ``.jsonl``, ``.json`` (one object per line) or ``.parquet``;
            or ``name``, ``name:config`` or ``name:config:split`` of ``datasets``. The split is by default the one of
            the argument.
        arg: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.

    Raises:
        ImportError: If the source needs a package that is not installed.
        FileNotFoundError: If there is no such file.
        ValueError: If the source is not a table with at least one row.
    """
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if path.is_file() and reader is not None:
        table = _read_file(path, reader, arg=arg)
    elif path.exists() or (reader is None and not _DATASET.fullmatch(source)):
        what = "a folder" if path.is_dir() else "another ending"
        raise ValueError(f"expected a file that ends in {', '.join(_READERS)} in `{arg}`, got {what}: {source!r}")
    elif reader is not None:
        raise FileNotFoundError(f"expected a file in `{arg}`, got {source!r}, which does not exist")
    else:
        table = _read_hub(source, arg=arg)
    if not table.columns or len(table) == 0:
        raise ValueError(f"expected at least one row of text in `{arg}`, got none in {source!r}")
    return table


def _read_file(path: Path, reader: Callable[[Path], Table], *, arg: str) -> Table:
    try:
        return reader(path)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        fault = f"not UTF-8 at byte {error.start}" if isinstance(error, UnicodeDecodeError) else brief(error)
        raise ValueError(f"expected a readable {path.suffix} file in `{arg}`, got {str(path)!r}: {fault}") from error


def _by_column(names: Sequence[str], rows: Iterator[list[str]], table: Table) -> Table:
    """The table with cells of rows under names."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"expected distinct names of columns in {table.source}, got {twice[0]!r} more than once")
    cells: list[list[str]] = []
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(
                f"expected {len(names)} cells in {table.place(number)}, as in its first line, got {len(row)}"
            )
        cells.append(row)
    columns = [list(column) for column in zip(*cells, strict=True)] if cells else [[] for _ in names]
    table.columns.update(zip(names, columns, strict=True))
    return table


def _read_tsv(path: Path) -> Table:
    """Without quoting, as GLUE's files are; other signs that end lines are part of the text.

    An empty line is a row of one empty cell, at the end too: what is left out would shift the rows of predictions.
    """
    content = path.read_bytes().decode("utf-8-sig")
    rows = (line.removesuffix("\r").split("\t") for line in content.removesuffix("\n").split("\n"))
    table = Table({}, str(path), first=2, unit="line")
    return _by_column(next(rows), rows, table) if content.strip("\r\n") else table


def _read_csv(path: Path) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = (row or [""] for row in csv.reader(file, strict=True))  # an empty line is a row, as in a TSV file
        names = next((row for row in rows if row != [""]), None)
        table = Table({}, str(path))
        return table if names is None else _by_column(names, rows, table)


class _RepeatedKeyError(Exception):
    """A key that a JSON object has twice."""


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(repr(next(name for name in names if names.count(name) > 1)))
    return row


def _read_jsonl(path: Path) -> Table:
    table = Table({}, str(path), unit="line")
    lines = path.read_bytes().decode("utf-8-sig").rstrip().split("\n")
    for number, line in enumerate([] if lines == [""] else lines):
        try:
            row = json.loads(line, object_pairs_hook=_distinct_keys)
        except _RepeatedKeyError as error:
            raise ValueError(f"expected distinct keys in {table.place(number)}, got {error} more than once") from error
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"expected one JSON object per line, got {line[:60]!r} in {table.place(number)}")
        if number == 0:
            table.columns.update({name: [] for name in row})
        if row.keys() != table.columns.keys():
            raise ValueError(
                f"expected the keys {list(table.columns)} of the first line, got {list(row)} in {table.place(number)}"
            )
        for name, cell in row.items():
            table.columns[name].append(cell)
    return table


def _read_parquet(path: Path) -> Table:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"expected pyarrow to read {path}, which is not installed; {MISSING_EXTRA}") from error
    try:
        return Table(parquet.read_table(path, partitioning=None).to_pydict(), str(path))
    except Exception as error:  # of many kinds
        reason = brief(error)
    raise ValueError(f"expected a Parquet file, got {str(path)!r}: {reason}")


_READERS: dict[str, Callable[[Path], Table]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_hub(source: str, *, arg: str) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"expected a file in `{arg}`, or the package datasets, which is not installed, for the name {source!r}; "
            f"{MISSING_EXTRA}"
        ) from error
    name, config, split, *_ = [*source.split(":"), "", ""]
    rows: Any = None
    try:
        rows = datasets.load_dataset(name, config or None, split=split or _HUB_SPLITS[arg])
    except Exception as error:  # of many kinds: of the hub, of the network, of the loader
        reason = brief(error)
    if rows is None:  # not within `except`: an error that it led to is taken for one of the user's own code
        raise ValueError(
            f"expected a file that ends in {', '.join(_READERS)}, or a name of `datasets`, in `{arg}`, got "
            f"{source!r}: {reason}"
        )
    names = {
        column: list(kind.names) for column, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)
    }
    return Table({column: list(rows[column]) for column in rows.column_names}, source, first=0, class_names=names)
