"""What can be read in two ways in a user's own file is refused, with what makes it plain."""

from collections.abc import Sequence

import numpy as np

from tenzoo.data.entries import Array
from tenzoo.data.markers import check_markers

_MAX_MODES = 8
"""A list of entries with more columns of indices than this is a dense table, unless a shape says otherwise."""
_MIN_ROWS = 10
"""In fewer rows all indices of a column may differ by chance."""
_ROW_NAMES = frozenset({"", "unnamed: 0", "index", "row", "id"})
"""What a column of row numbers is called, in lower case."""
_VALUE_NAMES = frozenset({"value", "values", "rating", "ratings", "star", "stars", "score", "scores", "target", "y"})


def check_columns(names: Sequence[str] | None, *, arg: str) -> None:
    """Refuse a table whose header says that the last column is not the value.

    Raises:
        ValueError: If so.

    Example:
        >>> check_columns(["user", "film", "rating"], arg="dataset")
    """
    low = [name.strip().strip("\"'# ").lower() for name in names or []]
    if low and low[-1] not in _VALUE_NAMES and (found := [name for name in low[:-1] if name in _VALUE_NAMES]):
        raise ValueError(
            f"expected the value in the last column of `{arg}`, got {found[0]!r} before {low[-1]!r}; move it to "
            "the end, and leave out what is no index"
        )


def check_numbering(index: Array, names: Sequence[str] | None, *, arg: str) -> None:
    """Refuse indices that are no plain numbering of each mode from 0 on. Not asked where the user gives a shape.

    Args:
        index: Shape ``(n, order)``, int64, at least 0, each row once.
        names: Of the columns, if the file has a header.
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
                f"expected indices that occur again in {where}, got another one in each of {count} rows, as row "
                "numbers are; leave the column out, or give `shape` if it is a mode"
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


def check_dense(values: Array, *, arg: str) -> None:
    """Refuse a dense array in which a number may stand for a missing value.

    Raises:
        ValueError: For zeros in an array of integers, which has no NaN, and for the usual markers.

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
