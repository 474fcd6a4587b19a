"""What a plan has decomposed: kept in memory, so that nothing is decomposed twice when the plan is applied."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tenzoo.compression.fingerprint import model_fingerprint
from tenzoo.compression.options import LayerOptions
from tenzoo.compression.plans import Plan
from tenzoo.compression.progress import each
from tenzoo.compression.ranks import LayerRank
from tenzoo.compression.replaceable import Replacement, Weight, own_parameters


class Decompositions:
    """The replacements of weights that were decomposed for a plan, and which model they belong to.

    Args:
        model: The model that was planned.
        replacements: Its weights that become cores, and their replacements.
    """

    def __init__(self, model: nn.Module, replacements: Sequence[tuple[Weight, Replacement]]) -> None:
        self._fingerprint = model_fingerprint(model)
        self._replacements = {weight.name: replacement for weight, replacement in replacements}

    def fit(self, model: nn.Module) -> bool:
        """Whether a model has the modules and, bit for bit, the numbers of the one that was planned."""
        return model_fingerprint(model) == self._fingerprint

    def copies(self, weights: Sequence[Weight]) -> list[tuple[Weight, Replacement]]:
        """Copies of the replacements, for the weights of a model that they fit.

        The copies are on the devices of the weights, and are frozen where the weights are.
        """
        copies = []
        for weight in each(weights, "replacing layers"):
            replacement = copy.deepcopy(self._replacements[weight.name]).to(weight.dense.device)
            replacement.factorization.requires_grad_(weight.trained)
            copies.append((weight, replacement))
        return copies


def decompose(
    model: nn.Module, options: Sequence[LayerOptions], ranks: Sequence[LayerRank]
) -> tuple[Plan, list[tuple[Weight, Replacement]]]:
    """The plan with these ranks, and the replacements of the weights that become cores."""
    layers, replacements = [], []
    rows = list(zip(options, ranks, own_parameters([option.weight for option in options]), strict=True))
    for option, rank, dense_parameters in each(rows, "decomposing layers"):
        layer, replacement = option.planned(rank, dense_parameters)
        layers.append(layer)
        if replacement is not None:
            replacements.append((option.weight, replacement))
    everything = sum(parameter.numel() for parameter in model.parameters())
    return Plan(tuple(layers), everything - sum(layer.dense_parameters for layer in layers)), replacements


def dense_weights(replacements: Sequence[tuple[Weight, Replacement]]) -> Iterator[tuple[str, Tensor]]:
    """Full names of weights and the dense tensors that their replacements reconstruct, one at a time."""
    for weight, replacement in replacements:
        with torch.no_grad():
            yield weight.full_name, replacement.dense_weight()
