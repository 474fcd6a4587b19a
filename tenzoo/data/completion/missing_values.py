"""Numbers that mark missing values: what they look like, and when they are refused."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tenzoo.data.arrays import Array

_NINES = tuple(float("9" * digits) for digits in range(3, 9))
_HUGE = (1e20, 1e30, 1e34, 1e35, 1e36, 1e37, 1e38, 9.969209968386869e36, 9.96921e36, 1.70141e38, 1.7014118e38)
_SINGLE_LIMITS = (3.4e38, 3.40282e38, float(np.finfo(np.float32).max))
_LIMITS = (-(2**15), 1 - 2**15, -(2**31), 1 - 2**31, 2**31 - 1, 2**32 - 1, -(2**63), 2**63 - 1, 2**64 - 1)
_USUAL = (
    *(sign * number for sign in (-1, 1) for number in (*_NINES, *_HUGE, *_SINGLE_LIMITS, 8888.0)),
    *(-99.0, -99.9, -99.99, -999.9, -999.99, -9999.9, -888.0, -7777.0, -1e10),
    *map(float, _LIMITS),
)
"""Mark missing values wherever they are far from all others. NumPy's masked arrays write 999999 and 1e20, netCDF writes
9.97e36."""
_POSSIBLE = (
    *(-1.0, -77.0, 77.0, -88.0, 88.0, 99.0, -777.0, 777.0, 888.0, 99.9, 999.9, 1e10, 1e15),
    *(-127.0, -128.0, 127.0, 255.0, 32767.0, -65504.0, 65504.0, 65535.0, -1e3, -1e4, -1e5, -1e6),
    *(63.0, 16959.0),  # 999999 in one byte and in two
)
"""Mark missing values only if they are repeated, among at least three others."""
_SATURATED = (127.0, 255.0)
"""Bytes saturate here, with or without a gap below."""
_LEAST_PEAK = 9999
"""A price may often be 999."""
_LEAST_CODE = 256
"""Smaller whole numbers are limits of bytes, percentages and scales."""
_FEW = 3
_MANY = 10


@dataclass(frozen=True)
class _Rest:
    """The values that are not markers.

    Args:
        low: The smallest.
        high: The largest.
        spacing: The widest gap between neighbors.
        different: The number of different values.
        most: How often the most frequent value except 0 occurs.
    """

    low: float
    high: float
    spacing: float
    different: int
    most: int

    @classmethod
    def of(cls, values: Array, counts: Array) -> "_Rest":
        spacing = float(np.diff(values).max()) if len(values) > 1 else 0.0
        most = max(1, int(counts[values != 0].max(initial=0)))
        return cls(float(values[0]), float(values[-1]), spacing, len(values), most)

    @property
    def span(self) -> float:
        return self.high - self.low

    def gap(self, value: float) -> float:
        """The distance below or above all others, at most 0 for a value between them."""
        return max(self.low - value, value - self.high)


def without_markers(values: Array, markers: Sequence[float]) -> Array:
    """The values with NaN in place of the numbers that a user says mark missing ones.

    Example:
        >>> without_markers(np.array([1, -999, 2]), [-999]).tolist()
        [1.0, nan, 2.0]
    """
    if not len(markers):
        return values
    kind = values.dtype if values.dtype.kind == "f" else np.dtype(np.float64)
    found = np.isin(values.astype(kind), np.asarray(markers, dtype=np.float64).astype(kind))
    return np.where(found, np.asarray(np.nan, dtype=kind), values.astype(kind))


def check_markers(values: Array, *, arg: str, rated: bool = False) -> None:
    """Refuse markers of missing values: the usual ones if they are far from all others, and any other far value.

    Args:
        values: Of any shape and real type; NaN means missing.
        arg: Name of the argument, for the error.
        rated: Whether the values are called ratings, which are never −1, and 0 only as one grade of several.

    Raises:
        ValueError: If there are any.

    Example:
        >>> check_markers(np.array([-999.0, -998.0, 3.0]), arg="dataset")
    """
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    exact, counts = np.unique(known, return_counts=True)
    numbers = exact.astype(np.float64)
    usual, possible = (_among(exact, markers) for markers in (_USUAL, (*_POSSIBLE, 0.0) if rated else _POSSIBLE))
    plain = ~(usual | possible)
    found = np.zeros(len(numbers), dtype=bool)
    for place in np.flatnonzero(usual | possible):
        others = plain if plain.any() else np.arange(len(numbers)) != place
        if others.any():
            rest = _Rest.of(numbers[others], counts[others])
            found[place] = _is_marker(numbers[place], counts[place], rest, usual=usual[place], rated=rated)
    advice = "subtract an offset if it is a value"
    if not found.any():
        found[_far_off(numbers, counts)] = True
        advice = "bring it nearer to the others if it is a value"
    if found.any():
        digits = 15 if values.dtype == np.float64 or values.dtype.kind in "iu" else 7
        named = " and ".join(f"{counts[at]} times {numbers[at]:.{digits}g}" for at in np.flatnonzero(found))
        others = numbers[~found]
        floats = "" if values.dtype.kind == "f" else "save floats, "
        raise ValueError(
            f"expected NaN for missing values in `{arg}`, got {named} where all others are from {others[0]:.6g} to "
            f"{others[-1]:.6g}; {floats}write NaN for it, name it in `missing_values`, or {advice}"
        )


def _among(exact: Array, markers: tuple[float, ...]) -> Array:
    """Which values equal a marker in the precision of their type."""
    kind = np.float16 if exact.dtype == np.float16 else np.float32  # a float64 array may hold rounded float32
    with np.errstate(over="ignore"):
        return np.isin(exact.astype(kind), np.array(markers).astype(kind)) & np.isfinite(exact)


def _is_marker(value: float, count: int, rest: _Rest, *, usual: bool, rated: bool) -> bool:
    gap = rest.gap(value)
    peak = count >= _MANY * rest.most
    if not usual and (count < 2 or (rest.different < _FEW and not gap > _MANY * rest.span > 0)):
        return False
    if gap <= 0:  # between the others
        return peak and (value == -1 or (usual and not 0 < value < _LEAST_PEAK))
    if value in (-1, 0):  # 0 only among ratings
        return rest.low >= 0 and ((rated and value < 0) or gap > rest.spacing or count >= _FEW * rest.most)
    if gap > rest.span or (value < 0 <= rest.low and (count > 1 or gap > rest.spacing)):
        return True
    if peak and usual and value < 0 and value not in _LIMITS:
        return True
    return count > 1 and value not in _SATURATED and gap > (_FEW if peak else _MANY) * rest.spacing


def _far_off(numbers: Array, counts: Array) -> list[int]:
    """The place of a value that occurs often, far from all others.

    Its distance is ten times their span, or it is a large whole number, a peak, and farther than ten of their gaps.
    """
    if len(numbers) <= _FEW:
        return []
    for place, others in ((0, slice(1, None)), (len(numbers) - 1, slice(None, -1))):
        rest, value, count = _Rest.of(numbers[others], counts[others]), numbers[place], counts[place]
        gap = rest.gap(value)
        code = abs(value) >= _LEAST_CODE and value == np.floor(value) and count >= _MANY * rest.most
        if count >= _FEW and value != 0 and (gap > _MANY * rest.span or (code and gap > _MANY * rest.spacing)):
            return [place]
    return []
