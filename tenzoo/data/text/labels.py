"""Labels of texts: the names of classes, or numbers."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tenzoo.data.text.tables import Table

_INTEGER = re.compile(r"[+-]?\d{1,4000}")
"""Of as many digits as Python reads."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

LabelKind = Literal["classes", "numbers"]


@dataclass(frozen=True)
class Labels:
    """What the labels of a column mean.

    Args:
        names: The names of classes, by number; ``None`` for regression.
        kind: What they are said to be; ``None`` where the labels themselves tell.
    """

    names: tuple[str, ...] | None
    kind: LabelKind | None = None

    @classmethod
    def of(cls, table: Table, column: str, kind: LabelKind | None = None) -> "Labels":
        """The meaning of the labels to train on.

        Integers are classes counted from 0. Other numbers are for regression. All else are names of classes, which are
        numbered in the order of the alphabet. With ``kind`` all labels are names of classes, those that are numbers
        alone in their order as numbers, or all are numbers for regression.

        Args:
            table: The table to train on.
            column: That of labels.
            kind: What they are; ``None`` as above.

        Raises:
            ValueError: If the column is missing, a label too, or the labels are no classes without gaps, or not of
                ``kind``.
        """
        cells, stated = _cells(table, column)
        for row, cell in enumerate(cells):
            if not cell:
                raise ValueError(f"expected a label in column {column!r} in {table.place(row)}, got none")
        what = f"in column {column!r} of {table.source}"
        if kind == "numbers":
            if stated is not None:
                raise ValueError(
                    f"expected None or 'classes' in `label_kind` for the named classes {what}, got {kind!r}"
                )
            return cls(None, kind)
        if stated is not None:
            return cls(tuple(stated), kind)
        names = _classes(sorted(set(cells)), what) if kind is None else tuple(_ordered(cells))
        if names is not None and len(names) < 2:
            raise ValueError(f"expected at least two classes {what}, got {names[0]!r} alone")
        return cls(names, kind)

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 for regression."""
        return 1 if self.names is None else len(self.names)

    def encode(self, table: Table, column: str) -> Tensor:
        """The labels of a table: int64 ``(n,)`` for classes, float32 ``(n,)`` for regression.

        Raises:
            ValueError: If the column is missing, or has a label that is not known.
        """
        cells, _ = _cells(table, column)
        if self.names is None:
            return torch.tensor([_number(cell, table, row, column) for row, cell in enumerate(cells)])
        numbers = {name: number for number, name in enumerate(self.names)}
        are_numbers = all(_value(name) is not None for name in self.names)
        labels = []
        for row, cell in enumerate(cells):
            spelled = _spelled(cell) if are_numbers and (self.kind or _INTEGER.fullmatch(cell)) else cell
            number = numbers.get(cell, numbers.get(spelled))
            if number is None:
                raise ValueError(
                    f"expected a label of those to train on, {_brief(self.names)}, in column {column!r} in "
                    f"{table.place(row)}, got {cell!r}{self._remedy(cell) if are_numbers else ''}"
                )
            labels.append(number)
        return torch.tensor(labels)

    def _remedy(self, cell: str) -> str:
        """What makes a number a label beside classes that are integers."""
        value = None if self.kind else _value(cell)
        if value is None or _INTEGER.fullmatch(cell):
            return ""
        kind = "classes" if value == int(value) else "numbers"
        return f"; give {kind!r} in `label_kind` if all labels are {kind}"


def has_labels(table: Table, column: str) -> bool:
    """Whether a table has a label at all; where the hub has none, it has −1 in all rows."""
    return column in table.columns and any(_cells(table, column)[0])


def _cells(table: Table, column: str) -> tuple[list[str], Sequence[str] | None]:
    """Labels as strings, empty where there is none or NaN, and the names of classes if the table states them."""
    cells = table.column(column, arg="label")
    stated = (table.class_names or {}).get(column)
    if stated is None:
        cells = [None if isinstance(cell, float) and math.isnan(cell) else cell for cell in cells]
        _check_kinds(cells, table, column)
        return [_string(cell) for cell in cells], None
    return [stated[cell] if cell is not None and 0 <= cell < len(stated) else "" for cell in cells], stated


def _check_kinds(cells: Sequence[Any], table: Table, column: str) -> None:
    """Refuse what is no label, and truth values beside others, whose names they would take."""
    first: bool | None = None
    for row, cell in enumerate(cells):
        where = f"in column {column!r} in {table.place(row)}, got {cell!r}"
        if not isinstance(cell, str | int | float | None):
            raise ValueError(f"expected a name or a number {where}")
        if isinstance(cell, float) and math.isinf(cell):
            raise ValueError(f"expected a finite number {where}")
        if cell is not None and first is None:
            first = isinstance(cell, bool)
        if cell is not None and first != isinstance(cell, bool):
            kind = "true or false, as above," if first else "a name or a number, as above,"
            raise ValueError(f"expected {kind} {where}")


def _string(cell: Any) -> str:
    if isinstance(cell, bool):
        return str(cell).lower()
    return "" if cell is None else str(cell).strip()


def _classes(distinct: Sequence[str], what: str) -> tuple[str, ...] | None:
    """The names of classes, by number, as the labels themselves tell; None for regression."""
    numeric = [cell for cell in distinct if _NUMBER.fullmatch(cell)]
    if len(numeric) not in (0, len(distinct)):
        name = next(cell for cell in distinct if cell not in set(numeric))
        raise ValueError(
            f"expected numbers or names as labels {what}, got both: {numeric[0]!r} and {name!r}; give 'classes' in "
            "`label_kind` if all are names"
        )
    if numeric and not all(_INTEGER.fullmatch(cell) for cell in numeric):
        return None
    return tuple(_counted(distinct, what)) if numeric else tuple(distinct)


def _ordered(cells: Sequence[str]) -> list[str]:
    """The names of classes: by value where all are numbers, which are one class however they are written."""
    values = {_spelled(cell): _value(cell) for cell in cells}
    numbers = {name: value for name, value in values.items() if value is not None}
    return sorted(numbers, key=lambda name: numbers[name]) if len(numbers) == len(values) else sorted(set(cells))


def _value(cell: str) -> int | float | None:
    """The number that a label is; None for a name."""
    if not _NUMBER.fullmatch(cell):
        return None
    value = int(cell) if _INTEGER.fullmatch(cell) else float(cell)
    return value if isinstance(value, int) or math.isfinite(value) else None


def _spelled(cell: str) -> str:
    """A number in the one way that its class is named; a name as it is.

    Example:
        >>> [_spelled(cell) for cell in ("01", "1.0", "1e0", "0.50", "one")]
        ['1', '1', '1', '0.5', 'one']
    """
    value = _value(cell)
    if value is None:
        return cell
    return str(int(value) if value == int(value) else value)


def _counted(distinct: Sequence[str], what: str) -> list[str]:
    """The integers from 0 as strings."""
    numbers = sorted({int(cell) for cell in distinct})
    if numbers[0] < 0 or numbers[-1] != len(numbers) - 1:
        raise ValueError(
            f"expected classes counted from 0 without gaps {what}, got {_brief([str(number) for number in numbers])}; "
            "give 'classes' or 'numbers' in `label_kind`"
        )
    return [str(number) for number in numbers]


def _number(cell: str, table: Table, row: int, column: str) -> float:
    number = float(cell) if _NUMBER.fullmatch(cell) else math.nan
    if not abs(number) <= torch.finfo(torch.float32).max:  # not a number is not, either
        why = "; labels have single precision" if math.isfinite(number) else ""
        raise ValueError(f"expected a finite number in column {column!r} in {table.place(row)}, got {cell!r}{why}")
    return number


def _brief(names: Sequence[str]) -> str:
    shown = [*names] if len(names) <= 10 else [*names[:9], "…", names[-1]]
    return ", ".join(shown)
