"""Carrying out a plan, and going back."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from tenzoo.compression.inputs import Example, input_metrics
from tenzoo.compression.plan import LayerPlan, Plan
from tenzoo.compression.weights import TENSORIZED, find_weights
from tenzoo.layers import TensorizedLayer

M = TypeVar("M", bound=nn.Module)


def apply_(model: M, plan: Plan, *, calibration: Example | None = None) -> M:
    """Replace the layers of a model by layers made of cores, in place.

    All layers are decomposed before the first one is replaced: if one fails, the model stays as it was. A layer that is
    reached under several names is replaced under each. Frozen weights and biases stay frozen.

    Args:
        model: The one that was planned, or another with layers of the same names and shapes.
        plan: From :func:`~tenzoo.compression.plan`.
        calibration: The inputs that the plan was made with, if it was.

    Returns:
        The model itself.

    Raises:
        ValueError: If the plan was made with calibration data and there are none here, or the reverse; if a planned
            layer is missing, is of another class or shape, or cannot be replaced.
        MemoryError: As :func:`~tenzoo.compression.plan`.

    Example:
        >>> from tenzoo.compression import plan
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> apply_(model, plan(model, factorization="tt", ranks={"0": 8}))[0].weight.rank
        (8,)
    """
    found = {weight.name: weight for weight in find_weights(model)}
    if plan.data_aware != (calibration is not None):
        made_with, given = ("with", "none") if plan.data_aware else ("without", "some")
        raise ValueError(f"expected `calibration` data as in `plan`, which was made {made_with} them, got {given}")
    planned = [layer for layer in plan.layers if layer.rank is not None]
    for layer in planned:
        if layer.name not in found:
            raise ValueError(f"expected the planned layer {layer.name!r} in `model`, got a model without it")
        weight = found[layer.name]
        if weight.reason is not None:
            raise ValueError(f"expected a layer that can be replaced, got {layer.name!r}, which {weight.reason}")
        _check(weight.layer, layer)
    metrics: Mapping[str, Mapping[int, Tensor]] = {}
    if calibration is not None:
        metrics = input_metrics(
            model, {layer.name: _empty(found[layer.name].layer, layer) for layer in planned}, calibration
        )
    made = {
        found[layer.name].layer: _decomposed(found[layer.name].layer, layer, metrics.get(layer.name))
        for layer in planned
    }
    return _replaced(model, made)


def fold_(model: M) -> M:
    """Replace all layers that are made of cores by the dense layers of torch that compute the same, in place.

    Args:
        model: Any module.

    Returns:
        The model itself.

    Raises:
        ValueError: If the model itself is a tensorized layer: take its :meth:`to_dense`.

    Example:
        >>> from tenzoo.layers import TensorizedLinear
        >>> fold_(nn.Sequential(TensorizedLinear(8, 4, factorization="cp", rank=2)))
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    if isinstance(model, TensorizedLayer):
        raise ValueError(f"expected a model with tensorized layers in it, got a {type(model).__name__}; see to_dense()")
    made: dict[nn.Module, nn.Module] = {
        module: module.to_dense() for module in model.modules() if isinstance(module, TensorizedLayer)
    }
    return _replaced(model, made)


def _check(layer: nn.Module, planned: LayerPlan) -> None:
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    if type(layer).__name__ != planned.kind or shape != planned.shape:
        raise ValueError(
            f"expected a {planned.kind} with a weight of shape {planned.shape} as {planned.name!r}, got a "
            f"{type(layer).__name__} of {shape}"
        )


def _settings(planned: LayerPlan) -> dict[str, Any]:
    return {
        "factorization": planned.factorization,
        "rank": planned.rank,
        "tensorization": planned.tensorization,
    }


def _empty(layer: nn.Module, planned: LayerPlan) -> TensorizedLayer[Any]:
    return TENSORIZED[type(layer)].empty_like(layer, **_settings(planned))


def _decomposed(layer: nn.Module, planned: LayerPlan, metric: Mapping[int, Tensor] | None) -> nn.Module:
    return TENSORIZED[type(layer)].from_dense(layer, **_settings(planned), metric=metric)


def _replaced(model: M, made: Mapping[nn.Module, nn.Module]) -> M:
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and child in made:
                parent._modules[key] = made[child]
    return model
