"""Learning rates that follow the widths of a network and the structure of its weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import nn
from torch.optim import ASGD, SGD, Optimizer

from tenzoo.layers.factorized import FactorizedModule
from tenzoo.layers.fan_in import TABLES, core_fan_ins, fan_in


def check_base_width(base_width: object) -> None:
    """Refuse what is no width.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is below 1.
    """
    if base_width is None:
        return
    if isinstance(base_width, bool) or not isinstance(base_width, Integral):
        raise TypeError(f"expected an int >= 1 or null in `base_width`, got {base_width!r}")
    if base_width < 1:
        raise ValueError(f"expected an int >= 1 or null in `base_width`, got {base_width}")


def check_adaptive(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose steps are proportional to the gradients: it needs other factors.

    Raises:
        ValueError: Naming it.
    """
    if isinstance(optimizer, SGD | ASGD):
        raise ValueError(
            "expected an optimizer whose steps do not grow with the gradients, such as Adam or AdamW, with "
            f"`base_width`, got {type(optimizer).__name__}"
        )


def check_scaled(before: Sequence[Any], after: Sequence[Any], scheduler: object) -> None:
    """Refuse a scheduler that gives all groups of parameters the same learning rate, whatever they had.

    Args:
        before: The rates of the groups.
        after: The same once there is a scheduler.
        scheduler: For the message.

    Raises:
        ValueError: Naming it.
    """
    ratios = [float(new) / float(old) for old, new in zip(before, after, strict=True) if float(old)]
    if ratios and max(ratios) - min(ratios) > 1e-6 * max(ratios):
        raise ValueError(
            "expected a scheduler that multiplies learning rates in `lr_scheduler` with `base_width`, got "
            f'{type(scheduler).__name__}, which replaces them; "one_cycle" and "cosine" multiply'
        )


def learning_rate_factors(network: nn.Module, base_width: int) -> dict[int, float]:
    """By how much the learning rate of each parameter is multiplied; see :class:`~tenzoo.tasks.SupervisedTask`.

    Args:
        network: The network.
        base_width: The fan-in at which a dense weight has the factor 1.

    Returns:
        From the ``id`` of each trainable parameter.

    Raises:
        ValueError: If there is a matrix in a module that is no layer with a known fan-in.

    Example:
        >>> layer = nn.Linear(256, 10)
        >>> factors = learning_rate_factors(layer, 128)
        >>> factors[id(layer.weight)], factors[id(layer.bias)]
        (0.5, 1.0)
    """
    matrices: dict[int, float] = {}
    tables: dict[int, float] = {}
    for module in network.modules():
        size = fan_in(module)
        if size is not None:
            is_table = isinstance(module, TABLES)
            found = tables if is_table else matrices
            found |= _factors(module, size, 1.0 if is_table else base_width / size)
    factors = tables | matrices  # of a table that is the head as well, those of the head
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and id(parameter) not in factors:
            if parameter.ndim > 1:
                raise ValueError(
                    "expected the weights of linear layers, convolutions and embeddings, dense or made of cores, in "
                    f"`network` with `base_width`, got {name!r} of shape {tuple(parameter.shape)}"
                )
            factors[id(parameter)] = 1.0
    return factors


def by_learning_rate(groups: Iterable[dict[str, Any]], factors: Mapping[int, float], lr: Any) -> list[dict[str, Any]]:
    """Groups of parameters split by the factors of their learning rates.

    Args:
        groups: With ``"params"`` and ``"name"``.
        factors: From the ``id`` of each parameter.
        lr: Of a parameter with the factor 1.

    Returns:
        Groups with a learning rate each, whose factor has six digits. A factor other than 1 is part of the name, such
        as ``"cores*0.5"``.

    Example:
        >>> import torch
        >>> first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
        >>> group = {"params": [first, second], "name": "rest"}
        >>> found = by_learning_rate([group], {id(first): 1.0, id(second): 0.5}, 0.1)
        >>> [(group["name"], group["lr"]) for group in found]
        [('rest', 0.1), ('rest*0.5', 0.05)]
    """
    split = []
    for group in groups:
        members: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            members.setdefault(float(f"{factors[id(parameter)]:.6g}"), []).append(parameter)
        for factor, own in members.items():
            name = group["name"] if factor == 1 else f"{group['name']}*{factor:g}"
            split.append({**group, "params": own, "name": name, "lr": lr * factor})
    return split


def _factors(layer: Any, size: int, factor: float) -> Mapping[int, float]:
    """Those of a layer's weight, or of its cores."""
    fans = core_fan_ins(layer) if isinstance(layer, FactorizedModule) else None
    if fans is None:
        return {id(layer.weight): factor}
    cores = layer.factorization
    std = cores.network(len(cores.shape)).core_std(size**-0.5, cores.rank)
    return {
        id(core): factor * size * std / math.sqrt(fan) / len(fans) for core, fan in zip(cores.cores, fans, strict=True)
    }
