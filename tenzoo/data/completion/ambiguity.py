"""Refusals of user files that can be read in two ways. Each error says how to make the file unambiguous."""

import re
from collections.abc import Sequence

import numpy as np

from tenzoo.data.arrays import Array
from tenzoo.data.completion.missing_values import check_markers

_MAX_MODES = 8
"""A list of entries with more columns of indices is a dense table, unless a shape is given."""
_MIN_ROWS = 10
"""With fewer rows all indices of a column may differ by chance."""
_MIN_DIGITS = 20
"""This many decimals are rarely all from 1 to 5; three times as many of two digits rarely lack a leading 0."""
_LEAST_TIMESTAMP = 1000
_FROM_1990, _TO_2040 = 631_152_000, 2_208_988_800
_ROW_NAMES = frozenset({"", "unnamed: 0", "index", "row", "id"})
"""Names of a column of row numbers, in lower case."""
_RATING_NAMES = frozenset({"rating", "ratings", "star", "stars"})
_VALUE_NAMES = _RATING_NAMES | {"value", "values", "score", "scores"}
_TIME_NAMES = frozenset({"timestamp", "timestamps", "date", "datetime", "epoch", "unix", "unixtime", "when", "created"})
_TIME_UNITS = frozenset({"year", "month", "week", "day", "hour", "minute", "weekday"})
_INDEX_NAMES = frozenset({"id", "ids", "idx", "index", "key", "type"})


def check_columns(names: Sequence[str] | None, *, arg: str) -> None:
    """Refuse a table whose header shows that the last column is not the value.

    Raises:
        ValueError: If it does.

    Example:
        >>> check_columns(["user", "film", "rating"], arg="dataset")
    """
    if not names or _is_value(last := names[-1]):
        return
    if found := [name for name in names[:-1] if _is_value(name)]:
        raise ValueError(
            f"expected the value in the last column of `{arg}`, got {_bare(found[0])!r} before {_bare(last)!r}; move "
            "it to the end, and leave out what is no index"
        )
    words = _words(last)
    for what, known in (("a timestamp", _TIME_NAMES), ("an index", _INDEX_NAMES)):
        if words & known or (what == "a timestamp" and words and words <= _TIME_UNITS):
            raise ValueError(
                f"expected the value in the last column of `{arg}`, got {_bare(last)!r}, as {what} is called; move the "
                "value to the end, or call the column `value`"
            )


def check_no_times(values: Array, names: Sequence[str] | None, *, arg: str) -> None:
    """Refuse values that are times since 1970 or dates such as 20260131, unless a header calls them values.

    Raises:
        ValueError: If all of them lie from 1990 to 2040.

    Example:
        >>> check_no_times(np.arange(20.0) + 1e9, ["i", "j", "value"], arg="dataset")
    """
    known = values[np.isfinite(values)]
    if len(known) < _MIN_ROWS or (known != np.floor(known)).any() or (names and _is_value(names[-1])):
        return
    low, high = known.min(), known.max()
    seconds = any(scale * _FROM_1990 <= low and high < scale * _TO_2040 for scale in (1, 1e3, 1e6, 1e9))
    day, month = known % 100, known // 100 % 100
    dates = low >= 19900101 and high < 20400101 and ((day >= 1) & (day <= 31) & (month >= 1) & (month <= 12)).all()
    if seconds or dates:
        raise ValueError(
            f"expected values in the last column of `{arg}`, got {low:.0f} to {high:.0f}, as times are written; move "
            "the value to the end, or call the column `value` in a first line"
        )


def is_rating(names: Sequence[str] | None) -> bool:
    """Whether the header calls the last column a rating.

    Example:
        >>> is_rating(["user", "film", "Book-Rating"]), is_rating(["user", "film", "affinity"])
        (True, False)
    """
    return bool(names) and bool(_words((names or [""])[-1]) & _RATING_NAMES)


def check_same_columns(names: Sequence[str], expected: Sequence[str], *, arg: str) -> None:
    """Refuse cells whose columns have other names than those of the data, or another order.

    Case, spaces and quotes do not matter.

    Raises:
        ValueError: If the names differ.

    Example:
        >>> check_same_columns(["User", "film"], ["user", "film"], arg="predict_index")
    """
    given, own = ([_bare(name) for name in row] for row in (names, expected))
    if [name.lower() for name in given] != [name.lower() for name in own]:
        raise ValueError(
            f"expected the columns {','.join(own)} of the data in `{arg}`, got {','.join(given)}; use that order and "
            "those names"
        )


def _bare(name: str) -> str:
    return name.strip().strip("\"'# ")


def _words(name: str) -> set[str]:
    """The words of a name such as ``movieId`` or ``stars_given``, in lower case."""
    return {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)}


def _is_value(name: str) -> bool:
    words = _words(name)
    return bool(words & _VALUE_NAMES) and not words & (_TIME_NAMES | _TIME_UNITS | _INDEX_NAMES)


def check_numbering(index: Array, names: Sequence[str] | None, *, arg: str) -> None:
    """Refuse indices that do not number each mode from 0. Call it only where the user gives no shape.

    Args:
        index: Shape ``(n, order)``, int64, at least 0, each row once.
        names: The names of the columns, if the file has a header.
        arg: Name of the argument, for the errors.

    Raises:
        ValueError: For row numbers, indices that count from 1, and ids.

    Example:
        >>> check_numbering(np.array([[0, 1], [1, 0], [1, 2]]), None, arg="dataset")
    """
    count, order = index.shape
    if order > _MAX_MODES:
        raise ValueError(
            f"expected up to {_MAX_MODES} columns of indices and one of values in `{arg}`, got {order + 1} columns; "
            "save a dense table as .npy, or give its `shape`"
        )
    for mode in range(order):
        name = names[mode].strip() if names else ""
        where = f"column {mode + 1}{f' ({name})' if name else ''} of `{arg}`"
        smallest, largest = int(index[:, mode].min()), int(index[:, mode].max())
        different = len(np.unique(index[:, mode]))
        named = names is not None and name.lower() in _ROW_NAMES
        if different == count and count >= (2 if named else _MIN_ROWS):
            raise ValueError(
                f"expected repeated indices in {where}, got a different one in each of {count} rows, like row "
                "numbers; leave the column out, or give `shape` if it is a mode"
            )
        if 2 * different <= largest:
            raise ValueError(
                f"expected indices from 0 on in {where}, got {different} different ones from {smallest} to {largest}, "
                f"as ids are; number them from 0 to {different - 1}, or give `shape` if most are unknown"
            )
        if smallest > 0:
            raise ValueError(
                f"expected indices from 0 on in {where}, got {smallest} to {largest}; subtract {smallest} if they "
                f"count from {smallest}, or give `shape` if nothing is known at lower ones"
            )


def check_last_columns(table: Array, *, padded: bool, arg: str) -> None:
    """Refuse a table without names whose last two columns may be a number with a decimal comma, or value and time.

    They may be if all numbers are whole and the rows differ without the last index. Call it only where the user gives
    no shape.

    Args:
        table: Shape ``(n, order + 1)``.
        padded: Whether a number of the last column starts with a zero.
        arg: Name of the argument, for the error.

    Raises:
        ValueError: If they may be.

    Example:
        >>> check_last_columns(np.array([[0, 0, 0, 2], [0, 0, 1, 5]]), padded=False, arg="dataset")
    """
    count, width = table.shape
    last = table[:, -1]
    if width < 4 or count < 2 or not ((last >= 0) & (np.floor(table) == table).all(axis=1)).all():
        return
    largest = last.max()
    stamped = largest >= _LEAST_TIMESTAMP and len(np.unique(last)) == count >= _MIN_ROWS
    digits = (count < _MIN_DIGITS or last.min() == 0 or largest > 5) if largest < 10 else count < 3 * _MIN_DIGITS
    if (padded or stamped or digits) and len(np.unique(table[:, :-2], axis=0)) == len(np.unique(table[:, :-1], axis=0)):
        raise ValueError(
            f"expected column {width - 1} of `{arg}` to tell rows apart, as an index does, got {count} that differ "
            f"without it, as with a decimal comma, or a timestamp behind the value; write {table[0, -2]:.0f}."
            f"{last[0]:.0f} for a number, leave a timestamp out, or name all columns in a first line"
        )


def check_dense(values: Array, *, arg: str) -> None:
    """Refuse a dense array in which a number may mark a missing value.

    Raises:
        ValueError: For zeros in an array of integers, which has no NaN, and for markers.

    Example:
        >>> check_dense(np.array([[0.0, 1.0], [2.0, np.nan]]), arg="dataset")
    """
    if values.dtype.kind in "iu" and (zeros := int((values == 0).sum())):
        raise ValueError(
            f"expected floats in `{arg}`, in which NaN means missing, got {values.dtype} with {zeros} zeros of "
            f"{values.size}, which may mean missing or 0; save array.astype('float32'), with NaN for what is missing"
        )
    if values.dtype.kind in "iuf":
        check_markers(values, arg=arg)
