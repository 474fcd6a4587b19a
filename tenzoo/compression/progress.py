"""What is being done, for those who wait: the logger ``tenzoo.compression`` is told.

Phases are of level ``INFO``, the single layers within one of level ``DEBUG``.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

LOGGER = logging.getLogger("tenzoo.compression")


def each(items: Sequence[T], doing: str) -> Iterator[T]:
    """The items one by one, as the phase goes on.

    Args:
        items: Of the phase.
        doing: What is done with them, such as ``"decomposing layers"``.

    Example:
        >>> list(each("ab", "decomposing layers"))
        ['a', 'b']
    """
    LOGGER.info("%s: %d", doing, len(items))
    for number, item in enumerate(items, 1):
        LOGGER.debug("%s: %d of %d", doing, number, len(items))
        yield item
