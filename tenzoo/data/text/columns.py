"""Which columns are text, and the texts that are made of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

from tenzoo.data.text.tables import Table

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a sign, which a JSON file may have and no tokenizer takes."""

KNOWN_COLUMNS = (
    ("question", "sentence"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("sentence",),
    ("text",),
)
"""The names of GLUE, in the order they are looked for."""


@dataclass(frozen=True)
class Template:
    """A text with places for columns, such as ``"{sentence} It was"``.

    Args:
        literals: What stands before each place, and after the last.
        columns: The column of each place.
    """

    literals: tuple[str, ...]
    columns: tuple[str, ...]

    @classmethod
    def parse(cls, template: str) -> "Template":
        """The template of a string; ``{{`` and ``}}`` are braces.

        Raises:
            ValueError: If it has no place, or a place without a name, or one with a format.

        Example:
            >>> Template.parse("{sentence} It was")
            Template(literals=('', ' It was'), columns=('sentence',))
        """
        valid = "expected columns in braces in `template`, such as '{sentence} It was'"
        literals, columns = [""], []
        try:
            parts = list(Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"{valid}, got {template!r}: {error}") from error
        for literal, column, form, conversion in parts:
            literals[-1] += literal
            if column is None:
                continue
            if not column or form or conversion:
                raise ValueError(f"{valid}, got {template!r}")
            columns.append(column)
            literals.append("")
        if not columns:
            raise ValueError(f"{valid}, got {template!r} without one")
        return cls(tuple(literals), tuple(columns))

    def fill(self, cells: Mapping[str, str]) -> str:
        """The text with a cell of each column.

        Example:
            >>> Template.parse("{sentence} It was").fill({"sentence": "Fine."})
            'Fine. It was'
        """
        parts = [literal + cells[name] for literal, name in zip(self.literals, self.columns, strict=False)]
        return "".join(parts) + self.literals[-1]


def find_columns(table: Table, *, label: str) -> tuple[str, ...]:
    """The columns of text of a table, by their names; that of labels is none of them.

    Raises:
        ValueError: If no names are known.
    """
    for names in KNOWN_COLUMNS:
        if all(name in table.columns and name != label for name in names):
            return names
    known = ", ".join("+".join(names) for names in KNOWN_COLUMNS)
    raise ValueError(
        f"expected one of the columns {known} in {table.source}, got {list(table.columns)}; name those of text "
        "in `text`"
    )


def read_texts(table: Table, columns: Sequence[str], *, arg: str) -> list[list[str]]:
    """The cells of columns of text, one list per column.

    Args:
        table: The table.
        columns: Names.
        arg: The argument that names the columns, for errors.

    Raises:
        ValueError: If a column is missing, or a cell is empty or not a string.
    """
    texts = [table.column(name, arg=arg) for name in columns]
    for name, cells in zip(columns, texts, strict=True):
        for row, cell in enumerate(cells):
            if not isinstance(cell, str) or not cell.strip() or _SURROGATE.search(cell):
                raise ValueError(f"expected text in column {name!r} in {table.place(row)}, got {cell!r}")
    return texts
