"""Why a model cannot get smaller, for the error of a budget that cannot be met."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import nn
from torch.nn.utils import parametrize

from tenzoo.compression.options import LayerOptions
from tenzoo.compression.replaceable import find_weights, named_modules
from tenzoo.layers.factorized import FactorizedModule

Stays: TypeAlias = Sequence[tuple[LayerOptions, int]]
"""Layers that cannot get smaller, each with its number under the budget."""

_LISTED = 6
"""Number of reasons in a message, those of most parameters first."""

_HAS_CORES = "is made of cores already; fold_ the model first"
_PART = ".parametrizations"
"""The part of a name between a parametrized module and its original parameters."""


def obstacles(model: nn.Module, stays: Stays) -> str:
    """Parameters that stay as they are, grouped by the reason.

    Args:
        model: The model that should get smaller.
        stays: Its layers that cannot get smaller.

    Example:
        >>> model = nn.Sequential(nn.Bilinear(4, 3, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        >>> from tenzoo.compression.options import Decomposer
        >>> options = [LayerOptions(Decomposer(weight, "tt"), weight.reason) for weight in find_weights(model)]
        >>> obstacles(model, [(option, 0) for option in options if option.reason])
        "104 in '0', which is a Bilinear, for which there is no tensorized layer; 16 in '1', which is a LayerNorm, for \
which there is no tensorized layer"
    """
    reasons = {option.weight.module_name: option.reason or "is not worth its cores" for option, _ in stays}
    shrinking = {weight.module_name for weight in find_weights(model)} - reasons.keys()
    cores = {
        id(part): name.partition(_PART)[0]
        for name, module in named_modules(model)
        if isinstance(module, FactorizedModule)
        for part in module.modules()
    }
    owners_of_cores = set(cores.values())
    groups: dict[str, list[tuple[str, int]]] = {}
    met: set[int] = set()
    for name, module in named_modules(model):
        own = [p for p in module.parameters(recurse=False) if id(p) not in met]
        met |= {id(p) for p in own}
        owner = name.partition(_PART)[0]
        if not own or name in shrinking:
            continue
        if id(module) in cores or name in owners_of_cores:
            owner, reason = cores.get(id(module), name), _HAS_CORES
        else:
            reason = reasons.get(owner) or f"is a {_class(module)}, for which there is no tensorized layer"
        groups.setdefault(reason, []).append((owner, sum(p.numel() for p in own)))
    return _listed(groups)


def multiplied(stays: Stays) -> str:
    """Multiplications that stay as they are, grouped by the reason."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for option, number in stays:
        own = (
            "takes no fewer with cores"
            if option.contracts
            else "is reconstructed where a module reads it, which saves none"
        )
        if number:
            groups.setdefault(option.reason or own, []).append((option.weight.name, number))
    return _listed(groups) or "nothing, but rank one takes so many"


def _listed(groups: Mapping[str, list[tuple[str, int]]]) -> str:
    """Numbers by reason in one line: the largest first, each with the names of up to two modules."""
    ordered = sorted(groups.items(), key=lambda group: -sum(number for _, number in group[1]))
    parts = []
    for reason, members in ordered[:_LISTED]:
        names = list(dict.fromkeys(name for name, _ in members))
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        where = ", ".join(map(repr, names[:2])) if any(names) else "the model itself"
        parts.append(f"{sum(number for _, number in members):,} in {where}{more}, which {reason}")
    rest = sum(number for _, members in ordered[_LISTED:] for _, number in members)
    return "; ".join([*parts, *([f"{rest:,} elsewhere"] if rest else [])])


def _class(module: nn.Module) -> str:
    kind = type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
    return kind.__name__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__qualname__}"
