"""Ranks for all layers of a network: those that the user gives, or the best within a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple, Self, TypeAlias, cast

from torch import nn

from tenzoo.compression.candidates import allocate
from tenzoo.compression.obstacles import multiplied, obstacles
from tenzoo.compression.options import LayerOptions
from tenzoo.compression.plans import Counted
from tenzoo.compression.progress import each
from tenzoo.factorizations import Rank


class Cores(NamedTuple):
    """The cores that a layer gets: the name of their format, and its ranks."""

    factorization: str
    rank: tuple[int, ...]


LayerRank: TypeAlias = Cores | None
"""The cores of a layer; None leaves the layer dense."""


def given_ranks(options: Sequence[LayerOptions], ranks: Rank | Mapping[str, Rank]) -> list[LayerRank]:
    """The ranks of each layer as the user gives them; a layer that would not get smaller stays dense.

    Raises:
        TypeError: If a rank is of another type.
        ValueError: If a rank does not fit its layer, or a fraction leaves no room for rank one in any layer.
    """
    chosen = [_given_rank(option, ranks) for option in options]
    if _is_fraction(ranks) and not any(chosen) and not all(option.reason for option in options):
        raise ValueError(f"expected `ranks` that leave room for rank one in some layer, got {ranks!r}")
    return chosen


def _given_rank(option: LayerOptions, ranks: Rank | Mapping[str, Rank]) -> LayerRank:
    name = option.weight.name
    if isinstance(ranks, Mapping) and name in ranks and option.reason is not None:
        raise ValueError(
            f"expected ranks of layers that can be made of cores in `ranks`, got {name!r}, which {option.reason}"
        )
    if option.reason is not None:
        return None
    try:
        decomposer = option.decomposers[0]
        cores = decomposer.empty(ranks[name] if isinstance(ranks, Mapping) else ranks).factorization
    except (TypeError, ValueError) as error:
        if _is_fraction(ranks):
            return None  # rank one is larger
        message = str(error).replace("`rank`", "`ranks`")
        raise type(error)(f"{message} for {name!r}") from error
    usable = type(cores).usable_rank(cores.shape, cores.rank)
    smaller = decomposer.num_parameters(usable) < option.weight.dense.numel()
    return Cores(decomposer.factorization, usable) if smaller else None


def _is_fraction(ranks: object) -> bool:
    return isinstance(ranks, Real) and not isinstance(ranks, Integral) and 0 < ranks <= 1  # type: ignore[operator]


@dataclass(frozen=True)
class Budget:
    """How many parameters or multiplications a network may have.

    Args:
        allowed: The largest number.
        whole: The number that the dense network has.
        count: What is counted.
    """

    allowed: float
    whole: int
    count: Counted

    @classmethod
    def of(cls, budget: float, model: nn.Module, options: Sequence[LayerOptions], count: Counted) -> Self:
        """The budget that the user gives.

        Raises:
            TypeError: If it is no number.
            ValueError: If it is out of range.
        """
        valid = "a float in (0, 1], a fraction, or an int >= 1, an absolute number,"
        if isinstance(budget, bool) or not isinstance(budget, Real):
            raise TypeError(f"expected {valid} in `budget`, got {budget!r}")
        if count == "parameters":
            whole = sum(parameter.numel() for parameter in model.parameters())
        else:
            whole = sum(option.dense_multiplications or 0 for option in options)
        if not (budget >= 1 if isinstance(budget, Integral) else 0 < budget <= 1):
            raise ValueError(f"expected {valid} in `budget`, got {budget!r}")
        if not isinstance(budget, Integral):
            return cls(float(budget) * whole, whole, count)
        if budget >= whole:
            raise ValueError(f"expected fewer {count} in `budget` than the {whole:,} of the model, got {budget:,}")
        return cls(float(budget), whole, count)

    def ranks(self, model: nn.Module, options: Sequence[LayerOptions]) -> list[LayerRank]:
        """The ranks of each layer with a small loss of the whole network, within the budget.

        Raises:
            ValueError: If rank one in every layer is over the budget.
        """
        candidates = [option.candidates(self.count) for option in each(options, "choosing ranks of layers")]
        fixed = self.whole - sum(row[-1].cost for row in candidates)
        least = math.ceil(fixed + sum(min(choice.cost for choice in row) for row in candidates))
        try:
            chosen = allocate(candidates, self.allowed - fixed)
        except ValueError as error:
            stays = [
                (option, round(row[-1].cost)) for option, row in zip(options, candidates, strict=True) if len(row) == 1
            ]
            kept = obstacles(model, stays) if self.count == "parameters" else multiplied(stays)
            raise ValueError(
                f"expected at least {least:,} {self.count} in `budget`, the least that this model can be brought to, "
                f"got {math.floor(self.allowed):,} of {self.whole:,}{f'; what stays as it is: {kept}' if kept else ''}"
            ) from error
        return [None if each.rank is None else Cores(cast(str, each.factorization), each.rank) for each in chosen]
