"""Formats that are written as an einsum."""

from collections import Counter
from functools import cache
from typing import Any, ClassVar

from tenzoo.factorizations.base import Factorization
from tenzoo.factorizations.network import Leg, OrderError


class Einsum(Factorization):
    """A format of one order whose network is an einsum, such as ``"ar,br,cr->abc"``.

    Abstract: :func:`einsum_format` makes a class of each equation. The letters of the output are the modes of the
    tensor, in order; all others are bonds, with one rank each, in order of first appearance.
    """

    equation: ClassVar[str]

    @classmethod
    def legs(cls, order: int) -> list[tuple[Leg, ...]]:
        """The terms of the equation."""
        terms, modes = _parts(cls.equation)
        if order != len(modes):
            raise OrderError(
                f"expected the {len(modes)} modes {', '.join(modes)} of {cls.equation!r} in `shape`, got {order} modes"
            )
        return [tuple(modes.index(letter) if letter in modes else letter for letter in term) for term in terms]

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle names the equation, since its class has no place in a module."""
        return _empty, (self.equation,), self.__dict__


@cache
def einsum_format(equation: str) -> type[Factorization]:
    """The format that an einsum draws.

    Args:
        equation: The legs of each core, separated by commas, an arrow, and the modes of the tensor, one letter each.

    Raises:
        ValueError: If it is no such equation, a mode is in no core or in two, a bond in one core only, or a letter
            twice in a core.

    Example:
        >>> weight = einsum_format("ar,br,cr->abc")((4, 5, 6), rank=2)
        >>> weight.reconstruct().shape, [tuple(core.shape) for core in weight.cores]
        (torch.Size([4, 5, 6]), [(4, 2), (5, 2), (6, 2)])
    """
    _check(equation)
    made: type[Einsum] = type("Einsum", (Einsum,), {"equation": equation, "__module__": __name__})
    made.name = equation  # now, since a class that is defined with a name is registered
    return made


def _check(equation: str) -> None:
    valid = f"expected an einsum such as 'ar,br,cr->abc' in `factorization`, got {equation!r}"
    terms, modes = _parts(equation)
    if equation.count("->") != 1 or not all([*terms, modes]) or not "".join([*terms, modes]).isalpha():
        raise ValueError(f"{valid}; write letters, commas and one arrow")
    if len(modes) < 2:
        raise ValueError(f"{valid} with {len(modes)} mode; a tensor has two modes or more")
    for part in (*terms, modes):
        for letter, times in Counter(part).items():
            if times > 1:
                raise ValueError(f"{valid} with {letter!r} {times} times in {part!r}; write a letter once in each part")
    cores = Counter("".join(terms))
    for letter in modes:
        if cores[letter] != 1:
            raise ValueError(f"{valid} with the mode {letter!r} in {cores[letter]} cores; a mode belongs to one core")
    for letter, number in cores.items():
        if letter not in modes and number == 1:
            raise ValueError(f"{valid} with the bond {letter!r} in one core; a bond joins two cores or more")


def _parts(equation: str) -> tuple[list[str], str]:
    cores, _, modes = equation.partition("->")
    return cores.split(","), modes


def _empty(equation: str) -> Factorization:
    made = einsum_format(equation)
    return made.__new__(made)
