"""Tensor dropout: indices of bonds that are left out at random in training.

Kolbeinsson et al. 2021, "Tensor Dropout for Robust Learning", arXiv:1902.10758, section 3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TypeVar

from torch import nn

from tenzoo.factorizations.base import Factorization

M = TypeVar("M", bound=nn.Module)


def tensor_dropout_(module: M, p: float) -> M:
    """Set the tensor dropout of all factorizations in a module, in place.

    In training mode each index of each bond is kept with probability 1 − p, independently, and multiplied by
    1 / (1 − p), so the expectation of the tensor is the tensor itself. Each computation draws anew. In evaluation mode
    nothing is dropped. A hyperedge, such as the rank of a CP, is one bond; a bond of size 1 is always kept. The cores
    themselves, and their norms, stay as they are.

    Args:
        module: A factorization, or a module with factorizations in it.
        p: Probability that an index is dropped, at least 0 and less than 1; 0 drops none, at no cost.

    Returns:
        The module itself.

    Raises:
        TypeError: If ``p`` is not a real number.
        ValueError: If it is out of range, or there is no factorization.

    Example:
        >>> from tenzoo.factorizations import CP
        >>> weight = tensor_dropout_(CP((4, 5, 6), rank=100), 0.5)
        >>> weight.reconstruct().equal(weight.reconstruct())
        False
        >>> weight.eval().reconstruct().equal(weight.reconstruct())
        True
    """
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"expected a float in `p`, got {p!r}")
    if not 0 <= p < 1:
        raise ValueError(f"expected a probability >= 0 and < 1 in `p`, got {p!r}")
    found = [each for each in module.modules() if isinstance(each, Factorization)]
    if not found:
        raise ValueError(f"expected a module with factorizations in `module`, got a {type(module).__name__}")
    for each in found:
        each.dropout = float(p)
    return module


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Within it, no factorization in a module drops anything."""
    before = [(each, each.dropout) for each in module.modules() if isinstance(each, Factorization)]
    for each, _ in before:
        each.dropout = 0.0
    try:
        yield
    finally:
        for each, p in before:
            each.dropout = p
