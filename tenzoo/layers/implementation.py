"""A layer that is computed in two ways: with its dense weight, or with the cores."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from tenzoo.factorizations import Factorization
from tenzoo.layers.cost import Costs, Phase, Positions, count, count_per_position
from tenzoo.layers.factorized import FactorizedModule

Implementation: TypeAlias = Literal["auto", "reconstruct", "contract"]
"""Reconstruct the dense weight and call torch's operator, contract the input with the cores, or take the cheaper."""


_MANY = 2**30


def check_implementation(implementation: object) -> None:
    """Refuse what is no implementation.

    Raises:
        ValueError: If it is none.
    """
    if implementation not in get_args(Implementation):
        valid = sorted(get_args(Implementation))
        raise ValueError(f"expected one of {valid} in `implementation`, got {implementation!r}")


class FactorizedLayer(FactorizedModule):
    """A layer that reconstructs its dense weight, or contracts its input with the cores.

    Abstract: a subclass says how its weight is laid out, and how it is contracted with an input.

    Attributes:
        factorization: The cores.
        implementation: ``"auto"``, ``"reconstruct"`` or ``"contract"``.
        costs: What both implementations cost.
    """

    implementation: Implementation
    costs: Costs

    def __init__(self, implementation: Implementation) -> None:
        super().__init__()
        check_implementation(implementation)
        self.implementation = implementation

    def _count_costs(self) -> None:
        # On a copy of the cores without memory; now, since a compiler could not follow it later.
        weight = type(self.factorization)(self.factorization.shape, self.factorization.rank, device="meta")
        weight.schedules = self.factorization.schedules  # what is found here serves all calls
        with torch.no_grad():
            dense = self.as_weight(weight.reconstruct()).contiguous()
        inputs = self._example_inputs()
        positions = [self.positions(x) for x in inputs]
        self.costs = Costs(
            count(lambda: self.as_weight(weight.reconstruct())),
            count_per_position(lambda x: self._apply_dense(x, dense), inputs, positions),
            count_per_position(lambda x: self._contract(weight, x), inputs, positions),
        )

    def choose(self, positions: Positions, phase: Phase | None = None) -> Implementation:
        """The implementation that a call will take.

        An exported program has to serve any number of positions where their number is symbolic: it takes what is
        cheaper for many.

        Args:
            positions: Of the call.
            phase: None asks for the current one.
        """
        if self.implementation != "auto":
            return self.implementation
        if torch.compiler.is_exporting() and not isinstance(positions.outputs, int):
            positions = self._many()
        return self.costs.cheaper(positions, phase or self._phase(), next(iter(self.factorization.cores)).device.type)

    def _phase(self) -> Phase:
        if torch.is_grad_enabled():
            return "training"
        return "cached" if self._may_cache() else "inference"

    @abstractmethod
    def positions(self, x: Tensor) -> Positions:
        """How many rows, pixels or indices an input has: what the cost of a call grows with."""

    def _many(self) -> Positions:
        return Positions(_MANY, _MANY)

    @abstractmethod
    def _example_inputs(self) -> Sequence[Tensor]:
        """Inputs on the meta device, as :func:`~tenzoo.layers.cost.count_per_position` takes them."""

    @abstractmethod
    def _apply_dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """Torch's operator with a dense weight, without a bias."""

    @abstractmethod
    def _contract(self, weight: Factorization, x: Tensor) -> Tensor:
        """The same with the cores, in sequence."""
