"""What one weight of a network can become: it stays dense, or is made of cores of some rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tenzoo.compression.candidates import Candidate
from tenzoo.compression.plans import Counted, LayerPlan
from tenzoo.compression.reasons import has_counterpart
from tenzoo.compression.replaceable import Replacement, Weight
from tenzoo.factorizations import Rank
from tenzoo.factorizations.decomposition import multiply_modes, relative_norm, scaled_to_safety
from tenzoo.layers import TensorizedLayer
from tenzoo.layers.cost import Positions

_LARGE = 2**30
"""Samples of a batch so large that the work of a call that does not grow with the batch counts for nothing."""

_COUNTED = 32
"""Number of candidates of a layer whose multiplications are counted."""


class Decomposer:
    """Decomposes one weight in one format, and keeps what it has computed.

    Args:
        weight: The weight.
        factorization: Name of the format.
        metric: The metric of the errors (see :meth:`~tenzoo.factorizations.Factorization.decompose`); by default the
            Frobenius norm.
    """

    def __init__(self, weight: Weight, factorization: str, metric: Mapping[int, Tensor] | None = None) -> None:
        self.weight = weight
        self.factorization = factorization
        self.metric = metric or {}
        self._decomposed: dict[tuple[int, ...], Replacement] = {}

    def in_metric(self, metric: Mapping[int, Tensor] | None) -> "Decomposer":
        """The decomposer of the same weight in another metric; without one it is this decomposer."""
        return Decomposer(self.weight, self.factorization, metric) if metric else self

    @property
    def _settings(self) -> dict[str, Any]:
        return {"factorization": self.factorization, "tensorization": self.weight.whole_modes(self.factorization)}

    def empty(self, rank: Rank) -> Replacement:
        """The replacement with cores of these ranks, on the meta device."""
        return self.weight.empty(rank=rank, **self._settings)

    @cached_property
    def smallest(self) -> Replacement:
        """The replacement with cores of rank one, on the meta device."""
        return self.empty(1)

    @cached_property
    def errors(self) -> dict[tuple[int, ...], float]:
        """Squared relative errors by rank (see :meth:`~tenzoo.factorizations.Factorization.errors_by_rank`)."""
        tensor, _ = scaled_to_safety(self.smallest.as_tensor(self.weight.dense))
        return type(self.smallest.factorization).errors_by_rank(multiply_modes(tensor, self.metric))

    def num_parameters(self, rank: tuple[int, ...]) -> int:
        """Number of parameters of cores of these ranks."""
        cores = self.smallest.factorization
        return type(cores).network(len(cores.shape)).num_parameters(cores.shape, rank)

    def decomposed(self, rank: tuple[int, ...]) -> Replacement:
        """The replacement with cores of these ranks that approximate the weight."""
        if rank not in self._decomposed:
            self._decomposed[rank] = self.weight.decomposed(rank=rank, metric=self.metric, **self._settings)
        return self._decomposed[rank]

    @torch.no_grad()
    def error(self, replacement: Replacement) -> float:
        """``‖W − Ŵ‖ / ‖W‖`` of a replacement, in the metric."""
        dense = self.weight.dense
        parts = (replacement.dense_weight() - dense, dense)
        return relative_norm(*(multiply_modes(replacement.as_tensor(part), self.metric) for part in parts))


@dataclass(frozen=True, eq=False)
class LayerOptions:
    """What one layer can become, and what each option costs.

    Args:
        decomposers: Of the layer's weight, one for each format that is tried.
        reason: Why the layer stays dense; None if it need not.
        positions: Rows, pixels or indices for one sample; None if they were not counted, or the input does not reach
            the layer.
        importance: How far the layer's error moves the outputs of the model, in squares; None if that was not measured.
        called: Whether the model calls the layer on the example input. A weight that other code reads is reconstructed.
    """

    decomposers: tuple[Decomposer, ...]
    reason: str | None
    positions: Positions | None = None
    importance: float | None = None
    called: bool = True

    @property
    def weight(self) -> Weight:
        """The weight of the layer."""
        return self.decomposers[0].weight

    @property
    def layer_of_cores(self) -> TensorizedLayer[Any] | None:
        """The layer with cores of rank one that could replace the layer; None for a weight that stays a parameter."""
        if not has_counterpart(self.weight.owner):
            return None
        return layer if isinstance(layer := self.decomposers[0].smallest, TensorizedLayer) else None

    @property
    def contracts(self) -> bool:
        """Whether a layer with cores can save multiplications."""
        return self.weight.is_layer and self.called

    @cached_property
    def dense_multiplications(self) -> int | None:
        """Multiplications of the dense layer for one sample; None if the example input does not reach the layer."""
        if self.positions is None:
            return None
        if isinstance(self.weight.owner, nn.Embedding | nn.EmbeddingBag):
            return 0
        if (layer := self.layer_of_cores) is not None:
            return round(layer.costs.dense.growth(self.positions).multiplications)
        return round(self.weight.dense.numel() * self.positions.outputs)

    def multiplications(self, replacement: Replacement) -> int | None:
        """Multiplications of a replacement for one sample in a large batch."""
        if self.positions is None or not self.called or not isinstance(replacement, TensorizedLayer):
            return self.dense_multiplications
        costs = replacement.costs
        if costs.cheaper(self.positions.times(_LARGE), "cached", self.weight.dense.device.type) == "contract":
            return round(costs.contract.growth(self.positions).multiplications)
        return self.dense_multiplications

    def candidates(self, count: Counted) -> list[Candidate]:
        """The ranks that cost less than the dense weight, and the dense weight at the end."""
        if count == "parameters" and self.reason is not None:
            return [Candidate(None, 0, 0.0)]  # nothing could be saved
        dense_cost = self.weight.dense.numel() if count == "parameters" else self.dense_multiplications or 0
        dense = Candidate(None, dense_cost, 0.0)
        if self.reason is not None or dense_cost == 0:
            return [dense]
        found = [each for decomposer in self.decomposers for each in self._candidates_of(decomposer, count)]
        return [*(each for each in found if each.cost < dense_cost), dense]

    def _candidates_of(self, decomposer: Decomposer, count: Counted) -> list[Candidate]:
        """The ranks of one format."""
        errors = decomposer.errors
        if count == "parameters":
            costs = {rank: decomposer.num_parameters(rank) for rank in errors}
        else:
            costs = {rank: self.multiplications(decomposer.empty(rank)) or 0 for rank in _some(list(errors))}
        return [
            Candidate(rank, cost, self._loss(errors[rank]), decomposer.factorization) for rank, cost in costs.items()
        ]

    def _loss(self, error: float) -> float:
        """The loss that a squared relative error adds to the whole model, as :func:`plan` states.

        Without the importance of a layer a large error has to count for more: the ratio of noise to signal grows faster
        than the error.
        """
        if self.importance is not None:
            return self.importance * error
        signal = max(1 - error, 1e-12)
        return (1 - signal) / signal

    def planned(
        self, chosen: tuple[str, tuple[int, ...]] | None, dense_parameters: int
    ) -> tuple[LayerPlan, Replacement | None]:
        """The plan for this layer with its replacement; dense if ``chosen`` is None.

        Args:
            chosen: The format and the ranks that were chosen.
            dense_parameters: Number of parameters of the layer, bias included.
        """
        number = self.dense_multiplications
        dense = LayerPlan(
            name=self.weight.name,
            kind=type(self.weight.owner).__name__,
            shape=tuple(self.weight.dense.shape),
            factorization=None,
            rank=None,
            tensorization=None,
            parameters=dense_parameters,
            dense_parameters=dense_parameters,
            multiplications=number,
            dense_multiplications=number,
            error=0.0,
            reason=self.reason or "is not worth its cores",
        )
        if chosen is None or self.reason is not None:
            return dense, None
        factorization, rank = chosen
        decomposer = next(each for each in self.decomposers if each.factorization == factorization)
        replacement = decomposer.decomposed(rank)
        cores = sum(core.numel() for core in replacement.factorization.cores)
        plan = replace(
            dense,
            factorization=factorization,
            rank=replacement.factorization.rank,
            tensorization=replacement.tensorization,
            parameters=dense_parameters - self.weight.dense.numel() + cores,
            multiplications=self.multiplications(replacement),
            error=decomposer.error(replacement),
            reason=None,
        )
        return plan, replacement


def _some(ranks: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Some of the ranks, at about equal ratios of their places, the first and the last among them."""
    places = {round(len(ranks) ** (k / (_COUNTED - 1))) - 1 for k in range(_COUNTED)}
    return [ranks[place] for place in sorted(places)] if ranks else []
