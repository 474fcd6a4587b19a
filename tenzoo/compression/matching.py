"""Whether a plan fits a model: its layers, their sizes and their numbers."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from tenzoo.compression.plans import LayerPlan, Plan
from tenzoo.compression.reasons import counterparts
from tenzoo.compression.replaceable import Weight, find_weights, named_modules, own_parameters
from tenzoo.layers import TensorizedLayer


def check_plan(plan: object) -> None:
    """Refuse an object that is no plan."""
    if not isinstance(plan, Plan):
        raise TypeError(f"expected a Plan in `plan`, got a {type(plan).__name__}; Plan.load reads one from a file")


def matched(model: nn.Module, plan: Plan, *, numbers: bool = True) -> list[tuple[Weight, LayerPlan]]:
    """The weights of a model that become cores, with their plans.

    Args:
        model: A model that stays as it is.
        plan: A plan, which is refused if it does not fit the model.
        numbers: Whether the numbers of the plan are checked too.
    """
    planned = [layer for layer in plan.layers if layer.rank is not None]
    weights = find_weights(model)
    found = {weight.name: weight for weight in weights}
    for layer in planned:
        if layer.name not in found:
            raise _missing(model, layer.name)
        weight = found[layer.name]
        if weight.reason is not None:
            raise ValueError(f"expected a layer that can be replaced, got {layer.name!r}, which {weight.reason}")
        kind, shape = type(weight.owner).__name__, tuple(weight.dense.shape)
        if kind != layer.kind or shape != layer.shape:
            raise ValueError(
                f"expected a {layer.kind} with a weight of shape {layer.shape} as {layer.name!r}, got a {kind} of "
                f"{shape}"
            )
    if numbers:
        _check_numbers(model, plan, weights)
    return [(found[layer.name], layer) for layer in planned]


def _check_numbers(model: nn.Module, plan: Plan, weights: Sequence[Weight]) -> None:
    """Refuse a plan whose numbers are not those of the model with these weights."""
    expected = "expected a plan as it was made for `model` in `plan`, got"
    planned = {layer.name: layer for layer in plan.layers}
    owned = own_parameters(weights)
    for weight, own in zip(weights, owned, strict=True):
        layer = planned.pop(weight.name, None)
        if layer is None:
            raise ValueError(f"{expected} no layer {weight.name!r}, which the model has")
        for field, number, valid, source in _numbers(weight, layer, own):
            if number != valid:
                raise ValueError(f"{expected} {number} {field} of {layer.name!r}, where {source} {valid}")
    for name in planned:
        raise _missing(model, name)
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(owned)
    if plan.other_parameters != others:
        raise ValueError(f"{expected} {plan.other_parameters} other_parameters, where the model has {others}")


def _numbers(weight: Weight, layer: LayerPlan, own: int) -> Iterator[tuple[str, object, object, str]]:
    """Numbers in the plan of a layer: the field, its value, the valid value, and the source of that value."""
    yield "dense_parameters", layer.dense_parameters, own, "the model has"
    if layer.rank is None:
        yield "parameters", layer.parameters, own, "the dense layer has"
    else:
        cores = weight.empty(**settings_of(layer)).factorization
        usable = type(cores).usable_rank(cores.shape, layer.rank)
        yield "as the rank", list(layer.rank), list(usable), "the most that are of use are"
        number = own - weight.dense.numel() + sum(core.numel() for core in cores.cores)
        yield "parameters", layer.parameters, number, f"rank {list(layer.rank)} makes"
    dense = layer.dense_multiplications
    if layer.rank is None or not weight.is_layer or None in (layer.multiplications, dense):
        yield "multiplications", layer.multiplications, dense, "the dense layer has"


def _missing(model: nn.Module, name: str) -> ValueError:
    """The error for a planned layer that is not among those that can be replaced."""
    modules = dict(named_modules(model))
    layer = name.removesuffix(".weight")
    if layer != name and type(modules.get(layer)) in counterparts():
        return ValueError(
            f"expected a plan that replaces the layer {layer!r}, got one of an earlier version that keeps its "
            f"weight as the parameter {name!r}; plan the model again"
        )
    cores = isinstance(modules.get(name), TensorizedLayer)
    instead = "one that is made of cores already" if cores else "a model without it"
    return ValueError(f"expected the planned layer {name!r} in `model`, got {instead}")


def settings_of(planned: LayerPlan) -> dict[str, Any]:
    """The settings of the replacement of a layer."""
    return {
        "factorization": planned.factorization,
        "rank": planned.rank,
        "tensorization": planned.tensorization,
    }
