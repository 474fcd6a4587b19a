"""How many products are summed in a multiplication by a weight, dense or made of cores."""

import math

from torch import nn

from tenzoo.layers.base import TensorizedLayer
from tenzoo.layers.factorized import FactorizedModule
from tenzoo.layers.parametrized import TensorizedWeight

_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TABLES = (nn.Embedding, nn.EmbeddingBag)
"""Whose rows are looked up."""


def fan_in(layer: nn.Module) -> int | None:
    """The fan-in of a layer: how many products are summed for one number of its output.

    Args:
        layer: Dense, or made of cores.

    Returns:
        The number, 1 for a table, whose rows are looked up; None for a module that has no such weight.

    Example:
        >>> fan_in(nn.Conv2d(6, 8, 3)), fan_in(nn.Embedding(10, 4)), fan_in(nn.LayerNorm(4))
        (54, 1, None)
    """
    if isinstance(layer, TABLES):
        return 1
    if isinstance(layer, TensorizedWeight | TensorizedLayer):
        first = len(layer.tensorization[0])
        return math.prod(layer.factorization.shape[first:])
    return layer.weight[0].numel() if isinstance(layer, _MATRICES) else None


def core_fan_ins(layer: FactorizedModule) -> tuple[int, ...] | None:
    """The fan-in of each core of a layer, where the cores are multiplied to an input one after the other.

    Args:
        layer: Made of cores.

    Returns:
        As :meth:`~tenzoo.factorizations.network.Network.fan_ins`; None for a layer without an input or an output side.

    Example:
        >>> from tenzoo.layers import TensorizedLinear
        >>> core_fan_ins(TensorizedLinear(64, 16, factorization="tucker", rank=[3, 5]))
        (5, 3, 64)
    """
    if not isinstance(layer, TensorizedWeight | TensorizedLayer):
        return None
    cores = layer.factorization
    order, first = len(cores.shape), len(layer.tensorization[0])
    inputs = () if isinstance(layer, TABLES) else range(first, order)
    return cores.network(order).fan_ins(cores.shape, cores.rank, inputs)
