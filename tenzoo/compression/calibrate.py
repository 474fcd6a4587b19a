"""Calibration data in the choice of ranks: errors of outputs, importance of layers, and the better of two plans."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from torch import Tensor, nn

from tenzoo.compression.calls import Call
from tenzoo.compression.decompositions import decompose, dense_weights
from tenzoo.compression.metrics import output_metrics
from tenzoo.compression.options import LayerOptions
from tenzoo.compression.outputs import dense_outputs, output_error, sensitivities
from tenzoo.compression.plans import Plan
from tenzoo.compression.progress import LOGGER, each
from tenzoo.compression.ranks import LayerRank
from tenzoo.compression.replaceable import Replacement, Weight

ChooseRanks: TypeAlias = Callable[[Sequence[LayerOptions]], list[LayerRank]]
"""Chooses the ranks of all layers."""

_TRIED_ERROR = 0.2
"""Relative error of the weights with which the sensitivity of the outputs is measured."""


def in_metrics(
    model: nn.Module, options: Sequence[LayerOptions], smallest: Sequence[LayerRank], calls: Sequence[Call]
) -> list[LayerOptions]:
    """The options with errors in the metrics of the calibration data, for the layers that can become smaller."""
    layers = {
        option.weight.name: layer
        for option, rank in zip(options, smallest, strict=True)
        if rank is not None and (layer := option.layer_of_cores) is not None
    }
    metrics = output_metrics(model, layers, calls)
    return [
        replace(
            option, decomposers=tuple(each.in_metric(metrics.get(option.weight.name)) for each in option.decomposers)
        )
        for option in options
    ]


def weighed(model: nn.Module, options: Sequence[LayerOptions], calls: Sequence[Call]) -> list[LayerOptions]:
    """The options with the importance of each layer, by how far its error moves the outputs of the model.

    It is measured at one rank per layer, and depends on the rank.
    """
    changed: dict[str, tuple[Callable[[], Tensor], float]] = {}
    for option in each(options, "trying ranks of layers"):
        decomposer = option.decomposers[0]
        errors = {} if option.reason else decomposer.errors
        inexact = {rank: error for rank, error in errors.items() if error > 0}
        if inexact:
            rank = min(inexact, key=lambda rank: abs(math.sqrt(inexact[rank]) - _TRIED_ERROR))
            replacement = decomposer.decomposed(rank)
            changed[option.weight.full_name] = replacement.dense_weight, inexact[rank]
    found = sensitivities(model, changed, calls)
    least = 1e-6 * max(found.values(), default=0.0)
    names = [option.weight.full_name for option in options]
    importances = [max(found[name], least) or 1.0 if name in found else None for name in names]
    return [replace(option, importance=importance) for option, importance in zip(options, importances, strict=True)]


def better(
    model: nn.Module,
    by_outputs: Sequence[LayerOptions],
    by_weights: Sequence[LayerOptions],
    choose: ChooseRanks,
    held: Sequence[Call],
) -> tuple[Plan, list[tuple[Weight, Replacement]]]:
    """Of the plans by the errors of outputs and of weights, the better one on inputs held back."""
    expected = dense_outputs(model, held)
    found: list[tuple[float, Plan, list[tuple[Weight, Replacement]]]] = []
    ways: dict[Literal["weights", "outputs"], Sequence[LayerOptions]] = {"outputs": by_outputs, "weights": by_weights}
    for keeps, options in ways.items():
        plan, replacements = decompose(model, options, choose(options))
        error = output_error(model, dense_weights(replacements), held, expected)
        found.append((error, replace(plan, data_aware=True, keeps=keeps, output_error=error), replacements))
    error, plan, replacements = min(found, key=lambda way: way[0])
    if math.isfinite(error):
        return plan, replacements
    LOGGER.warning("the outputs of the network on `calibration` are not finite with these ranks; give it more")
    return replace(plan, output_error=None), replacements
