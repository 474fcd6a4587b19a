"""Restoring a compressed model from its plan and its state dict."""

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from tenzoo.compression.matching import check_plan, matched, settings_of
from tenzoo.compression.plans import Plan
from tenzoo.compression.replace import put_in_place
from tenzoo.state_dicts import kind_differences, lost_values, shape_differences, tensors_of, with_current_names

M = TypeVar("M", bound=nn.Module)


def restore_(model: M, plan: Plan, weights: Mapping[str, Tensor]) -> M:
    """Replace the layers of a dense model by layers with given cores, in place; nothing is decomposed.

    Args:
        model: A model of the class and the sizes that were planned; its numbers do not matter. What is on the meta
            device gets memory on the device of the weights.
        plan: The plan that the compressed model was made with.
        weights: The state dict of the model that :func:`~tenzoo.compression.apply_` returned, trained further or not.

    Returns:
        The model itself.

    Raises:
        TypeError: If ``plan`` is no plan, or ``weights`` no mapping to tensors.
        ValueError: As :func:`~tenzoo.compression.apply_`, or if the weights are not those of this model under this
            plan.

    Example:
        >>> from tenzoo.compression import apply_, plan
        >>> model, other = (nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)) for _ in range(2))
        >>> small = plan(model, factorization="tt", ranks=8)
        >>> weights = apply_(model, small).state_dict()
        >>> restore_(other, small, weights)[0].factorization.cores[0].equal(model[0].factorization.cores[0])
        True
    """
    check_plan(plan)
    pairs = matched(model, plan)
    if not isinstance(weights, Mapping):
        raise TypeError(f"expected a state dict in `weights`, got a {type(weights).__name__}")
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"expected tensors in `weights`, got a {type(value).__name__} as {name!r}")
    inner: nn.Module = getattr(model, "_orig_mod", model)
    weights = {name.removeprefix("_orig_mod."): value for name, value in weights.items()}
    # A copy without memory tells whether the weights fit before anything is replaced.
    skeleton = copy.deepcopy(inner).to("meta")
    empty = [(weight, weight.empty(**settings_of(layer))) for weight, layer in matched(skeleton, plan, numbers=False)]
    with put_in_place(skeleton, plan, empty):
        pass
    own = tensors_of(skeleton)
    weights = with_current_names(weights, own)
    _check_weights(inner, own, weights)
    device = next((value.device for value in weights.values()), torch.device("cpu"))
    replacements = []
    for weight, layer in pairs:
        home = device if weight.dense.is_meta else weight.dense.device
        replacement = weight.empty(**settings_of(layer)).to_empty(device=home)
        replacement.factorization.requires_grad_(weight.trained)
        replacements.append((weight, replacement))
    with put_in_place(inner, plan, replacements):
        for name, valid, given in lost_values(inner, weights):
            raise ValueError(f"expected {valid} as {name!r} in `weights`, got {given}")
        _give_memory(inner, device)
        inner.load_state_dict(weights)
    return model


def _check_weights(model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse a state dict of another model, and one that lacks numbers."""
    expected = "expected weights of the compressed model in `weights`, got"
    for name, mine, other in shape_differences(own, weights):
        raise ValueError(f"{expected} {name!r} of shape {other} where the plan has {mine}")
    for name, kind, given in kind_differences(own, weights):
        raise ValueError(f"{expected} {name!r} as {given} where the model has {kind}")
    for name, value in weights.items():
        if value.is_meta:
            raise ValueError(f"{expected} {name!r} on the meta device, without numbers")
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in weights:
            raise ValueError(
                f"expected a model with numbers in the buffers that its state dict leaves out, got {name!r} on the "
                f"meta device in `model`; make it on another device"
            )


def _give_memory(model: nn.Module, device: torch.device) -> None:
    """Give memory on a device to tensors on the meta device; those that share it still do."""
    allocated: dict[int, Tensor] = {}
    for module in model.modules():
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is None or not value.is_meta:
                continue
            if id(value) not in allocated:
                empty = torch.empty_like(value, device=device)
                is_parameter = isinstance(value, nn.Parameter)
                allocated[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
            setattr(module, key, allocated[id(value)])
