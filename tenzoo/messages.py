"""Values in messages and tables, no longer than there is room."""

import reprlib
from collections.abc import Sequence

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80

_SHORTEST = 8
"""Columns of a table that do not give way any further."""


def shown(value: object) -> str:
    """A value that was read from a file, which may be of any length and hold itself, in a short form.

    Example:
        >>> shown("tt"), len(shown("t" * 1000))
        ("'tt'", 80)
    """
    return _short.repr(value)


def elided(name: str, width: int) -> str:
    """A name without its middle, if it is longer than a width.

    Example:
        >>> elided("minilm_sst2_loretta", 11), elided("das", 11)
        ('minil…retta', 'das')
    """
    return name if len(name) <= width else f"{name[: width // 2]}…{name[len(name) - (width - 1) // 2 :]}"


def fitted(rows: Sequence[Sequence[str]], width: int, *, shrink: Sequence[int]) -> list[int]:
    """Widths of the columns of a table, with one blank between two.

    Args:
        rows: All cells, titles included.
        width: Of the terminal.
        shrink: Numbers of the columns that give way where it is narrow, the widest first.

    Example:
        >>> fitted([["layer", "parameters"], ["blocks.0.attention.query", "4,800"]], 20, shrink=[0])
        [9, 10]
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + len(widths) - 1 > width and max(widths[number] for number in shrink) > _SHORTEST:
        widths[max(shrink, key=lambda number: widths[number])] -= 1
    return widths
