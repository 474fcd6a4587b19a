"""Values in the messages of errors."""

import reprlib

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: object) -> str:
    """A value that was read from a file, which may be of any length and hold itself, in a short form.

    Example:
        >>> shown("tt"), len(shown("t" * 1000))
        ("'tt'", 80)
    """
    return _short.repr(value)
