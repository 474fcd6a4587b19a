"""Progress, which goes to the logger ``tenzoo.compression``.

Phases have the level ``INFO``, the single layers of a phase the level ``DEBUG``.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

LOGGER = logging.getLogger("tenzoo.compression")


def each(items: Sequence[T], doing: str) -> Iterator[T]:
    """The items of a phase one by one, with progress.

    Args:
        items: The items.
        doing: What is done with them, such as ``"decomposing layers"``.

    Example:
        >>> list(each("ab", "decomposing layers"))
        ['a', 'b']
    """
    LOGGER.info("%s: %d", doing, len(items))
    for number, item in enumerate(items, 1):
        LOGGER.debug("%s: %d of %d", doing, number, len(items))
        yield item
