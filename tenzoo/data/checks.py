"""Checks of plain arguments that several data modules share."""

import os
from numbers import Real
from typing import Any

MISSING_EXTRA = "pip install 'tenzoo[text]'"
"""What installs the packages that data of text need."""

MISSING_TABLES = "pip install 'tenzoo[tables]'"
"""What installs the packages that tables with labels need."""

MISSING_ARRAYS = "pip install 'tenzoo[arrays]'"
"""What installs the packages that arrays with coordinates need."""


def check_int(value: object, *, arg: str, least: int) -> int:
    """An integer that is large enough.

    Args:
        value: The argument.
        arg: Name of the argument, for the error.
        least: The smallest valid value.

    Raises:
        TypeError: If it is not an ``int``, or a ``bool``.
        ValueError: If it is smaller than ``least``.

    Example:
        >>> check_int(3, arg="seed", least=0)
        3
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an integer in `{arg}`, got {value!r}")
    if value < least:
        raise ValueError(f"expected at least {least} in `{arg}`, got {value}")
    return value


def check_bool(value: object, *, arg: str) -> bool:
    """A truth value.

    Args:
        value: The argument.
        arg: Name of the argument, for the error.

    Raises:
        TypeError: If it is not a ``bool``.

    Example:
        >>> check_bool(True, arg="standardize")
        True
    """
    if not isinstance(value, bool):
        raise TypeError(f"expected a bool in `{arg}`, got {value!r}; give true or false")
    return value


def check_fraction(value: object, *, arg: str, positive: bool = False, below_one: bool = False) -> float:
    """A number in [0, 1], with or without the ends.

    Args:
        value: The argument.
        arg: Name of the argument, for the error.
        positive: Whether 0 is refused.
        below_one: Whether 1 is refused.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is outside the interval, or NaN.

    Example:
        >>> check_fraction(0, arg="validation_fraction", below_one=True)
        0.0
    """
    interval = f"{'(' if positive else '['}0, 1{')' if below_one else ']'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected a number in {interval} in `{arg}`, got {value!r}")
    number = float(value)
    if not 0 <= number <= 1 or (positive and number == 0) or (below_one and number == 1):
        raise ValueError(f"expected a number in {interval} in `{arg}`, got {value!r}")
    return number


def check_path(value: object, *, arg: str, what: str, optional: bool = False) -> Any:
    """A path as a string: checkpoints hold builtins only.

    Args:
        value: The argument.
        arg: Name of the argument, for the error.
        what: What is valid, for the error.
        optional: Whether ``None`` is valid; it is returned as it is.

    Raises:
        TypeError: If it is another type, or empty.

    Example:
        >>> from pathlib import Path
        >>> check_path(Path("data") / "train.tsv", arg="train", what="a path")
        'data/train.tsv'
    """
    if value is None and optional:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise TypeError(f"expected {what} in `{arg}`, got {value!r}")
    return os.fspath(value)
