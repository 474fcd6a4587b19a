"""Tables in ``.csv`` files: their numbers and names, and what is wrong with them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tenzoo.data.arrays import Array

_PADDED = re.compile(rb",[ \t]*0\d+[ \t]*(?:[\r\n]|$)")


class Table(NamedTuple):
    """The content of a ``.csv`` file."""

    names: list[str] | None
    """The names of the columns, if the file has a header."""
    numbers: Array
    """Shape ``(rows, columns)``, float64."""
    padded: bool
    """Whether a number of the last column starts with 0."""
    numbered: bool
    """Whether the first line may number the columns from 0, as a data frame without names writes them."""


def parse_csv(path: Path) -> Table:
    """The table of a file.

    Raises:
        ValueError: And others, of NumPy, if the file is not a table of numbers separated by commas.
    """
    with path.open(encoding="utf-8-sig") as file:
        first = file.readline()
        if first.strip() and "," not in first:
            raise ValueError("not separated by commas")  # a header alone would hide it
        fields = first.split(",")
        header = _is_header(fields)
        if not header:
            file.seek(0)
        table = np.loadtxt(file, delimiter=",", comments=None, ndmin=2, dtype=np.float64)
        if header and len(table) and table.shape[1] != len(fields):
            raise ValueError(
                "as many names as columns"
            )  # else a decimal comma would turn part of a number into an index
        padded = not header and _PADDED.search(path.read_bytes()) is not None
        numbered = [field.strip() for field in fields] == [str(column) for column in range(len(fields))]
        return Table(first.rstrip("\n").split(",") if header else None, table, padded, numbered)


def csv_fault(path: Path) -> tuple[str, str] | None:
    """What the first wrong line should hold, and what it holds; ``None`` if no single line is wrong."""
    width = 0
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            fields, text = line.split(","), line.rstrip("\n")
            remedy = (
                "write commas between columns, points in numbers"
                if ";" in text or "\t" in text
                else "check the line, or name the columns in `index_columns` and `value_column`"
            )
            given = f"{text if len(text) <= 60 else text[:60] + '…'!r}; {remedy}"
            header = number == 1 and len(fields) > 1 and _is_header(fields)
            if "\ufffd" in line or "\0" in line:
                return None  # not a text file
            if header:
                width = len(fields)
            if not text or header:
                continue
            if len(fields) == 1 or not all(map(_is_number, fields)):
                return f"numbers separated by commas in line {number}", given
            if len(fields) != (width := width or len(fields)):
                return f"{width} columns in line {number}", f"{len(fields)}: {given}"
    return None


def _is_header(fields: Sequence[str]) -> bool:
    return not any(_is_number(field.strip().strip("\"'")) for field in fields)  # a number in quotes is not a name


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
