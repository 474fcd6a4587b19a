"""Carrying out a plan, and going back."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from tenzoo.compression.calls import Example, fingerprint, read_calls
from tenzoo.compression.inputs import input_metrics
from tenzoo.compression.plan import LayerPlan, Plan
from tenzoo.compression.weights import Weight, check_module, find_weights, put_parametrization, take_parametrization
from tenzoo.layers import TensorizedLayer, TensorizedWeight
from tenzoo.weights import kind_differences, shape_differences

M = TypeVar("M", bound=nn.Module)


def apply_(model: M, plan: Plan, *, calibration: Example | None = None) -> M:
    """Replace the layers of a model by layers made of cores, in place.

    All layers are decomposed before the first one is replaced: if one fails, the model stays as it was. A layer that is
    reached under several names is replaced under each; a weight of attention and recurrent layers, which read it by
    name, becomes a :class:`~tenzoo.layers.TensorizedWeight`, a parametrization of torch: such a model cannot be pickled
    whole, and is saved by its plan and its state dict (see :func:`restore_`). Frozen weights and biases stay frozen.

    Args:
        model: The one that was planned, or another with layers of the same names and shapes.
        plan: From :func:`~tenzoo.compression.plan`.
        calibration: The inputs that the plan was made with, if it was, in any of the forms of
            :mod:`~tenzoo.compression.calls`.

    Returns:
        The model itself.

    Raises:
        TypeError: If ``plan`` is no plan, or ``calibration`` no input.
        ValueError: If the plan was made with calibration data and there are none here, or others, or the reverse; if
            the model does not take them, or they are empty or not finite; if a planned layer is missing, is of another
            class or shape, or cannot be replaced.
        MemoryError: As :func:`~tenzoo.compression.plan`.

    Example:
        >>> from tenzoo.compression import plan
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> apply_(model, plan(model, factorization="tt", ranks={"0": 8}))[0].weight.rank
        (8,)
    """
    _check_plan(plan)
    if plan.data_aware != (calibration is not None):
        made_with, given = ("with", "none") if plan.data_aware else ("without", "some")
        raise ValueError(f"expected `calibration` data as in `plan`, which was made {made_with} them, got {given}")
    calls = [] if calibration is None else read_calls(calibration, "calibration", model)
    if calls and plan.calibration not in (None, fingerprint(calls)):
        raise ValueError(
            "expected the `calibration` data that `plan` was made with, got others; give both the same, which a "
            "DataLoader that shuffles or augments does not"
        )
    pairs = _matched(model, plan)
    metrics: Mapping[str, Mapping[int, Tensor]] = {}
    if calls:
        empty = {weight.name: weight.empty(**_settings(layer)) for weight, layer in pairs}
        layers = {name: made for name, made in empty.items() if isinstance(made, TensorizedLayer)}
        metrics = input_metrics(model, layers, calls)
    return _put(
        model,
        [(weight, weight.decomposed(**_settings(layer), metric=metrics.get(weight.name))) for weight, layer in pairs],
    )


def restore_(model: M, plan: Plan, weights: Mapping[str, Tensor]) -> M:
    """Give a dense model the cores that a plan has made of it before, in place, without decomposing anything.

    Args:
        model: Of the class and the sizes that were planned; its numbers do not matter.
        plan: That was carried out.
        weights: The state dict of the model that :func:`apply_` made, trained further or not.

    Returns:
        The model itself.

    Raises:
        TypeError: If ``plan`` is no plan, or ``weights`` no mapping to tensors.
        ValueError: As :func:`apply_`, or if the weights are not those of this model under this plan.

    Example:
        >>> from tenzoo.compression import plan
        >>> model, other = (nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)) for _ in range(2))
        >>> made = plan(model, factorization="tt", ranks=8)
        >>> weights = apply_(model, made).state_dict()
        >>> restore_(other, made, weights)[0].weight.cores[0].equal(model[0].weight.cores[0])
        True
    """
    _check_plan(plan)
    pairs = _matched(model, plan)
    if not isinstance(weights, Mapping):
        raise TypeError(f"expected a state dict in `weights`, got a {type(weights).__name__}")
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"expected tensors in `weights`, got a {type(value).__name__} as {name!r}")
    # A copy without memory tells whether the weights fit before anything is replaced.
    skeleton = copy.deepcopy(model).to("meta")
    _put(skeleton, [(weight, weight.empty(**_settings(layer))) for weight, layer in _matched(skeleton, plan)])
    expected = "expected weights of the compressed model in `weights`, got"
    for name, own, other in shape_differences(skeleton.state_dict(), weights):
        raise ValueError(f"{expected} {name!r} of shape {other} where the plan has {own}")
    for name, kind, given in kind_differences(skeleton.state_dict(), weights):
        raise ValueError(f"{expected} {name!r} as {given} where the model has {kind}")
    made = [(weight, weight.empty(**_settings(layer)).to_empty(device=weight.dense.device)) for weight, layer in pairs]
    for weight, new in made:
        new.train(weight.owner.training).weight.requires_grad_(weight.trained)
        if (bias := getattr(new, "bias", None)) is not None:
            bias.requires_grad_(weight.owner.bias.requires_grad)
    _put(model, made)
    model.load_state_dict(weights)
    return model


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
    check_module(model)
    if isinstance(model, TensorizedLayer):
        raise ValueError(f"expected a model with tensorized layers in it, got a {type(model).__name__}; see to_dense()")
    for owner in list(model.modules()):
        for name in list(getattr(owner, "parametrizations", ())):
            if isinstance(owner.parametrizations[name][0], TensorizedWeight):  # type: ignore[index]
                take_parametrization(owner, name)
    return _replaced(
        model, {module: module.to_dense() for module in model.modules() if isinstance(module, TensorizedLayer)}
    )


def _check_plan(plan: object) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"expected a Plan in `plan`, got a {type(plan).__name__}; Plan.load reads one from a file")


def _matched(model: nn.Module, plan: Plan) -> list[tuple[Weight, LayerPlan]]:
    """The weights of a model that become cores, and what the plan says of each."""
    found = {weight.name: weight for weight in find_weights(model)}
    planned = [layer for layer in plan.layers if layer.rank is not None]
    for layer in planned:
        if layer.name not in found:
            raise ValueError(f"expected the planned layer {layer.name!r} in `model`, got a model without it")
        weight = found[layer.name]
        if weight.reason is not None:
            raise ValueError(f"expected a layer that can be replaced, got {layer.name!r}, which {weight.reason}")
        kind, shape = type(weight.owner).__name__, tuple(weight.dense.shape)
        if kind != layer.kind or shape != layer.shape:
            raise ValueError(
                f"expected a {layer.kind} with a weight of shape {layer.shape} as {layer.name!r}, got a {kind} of "
                f"{shape}"
            )
    return [(found[layer.name], layer) for layer in planned]


def _settings(planned: LayerPlan) -> dict[str, Any]:
    return {
        "factorization": planned.factorization,
        "rank": planned.rank,
        "tensorization": planned.tensorization,
    }


def _put(model: M, made: Sequence[tuple[Weight, nn.Module]]) -> M:
    for weight, new in made:
        if isinstance(new, TensorizedWeight):
            put_parametrization(weight.owner, weight.parameter, new)
    return _replaced(model, {weight.owner: new for weight, new in made if weight.is_layer})


def _replaced(model: M, made: Mapping[nn.Module, nn.Module]) -> M:
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and child in made:
                parent._modules[key] = made[child]
    return model
