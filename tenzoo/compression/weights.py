"""Which weights of a model can be made of cores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedLayer, TensorizedLinear

TENSORIZED: Mapping[type[nn.Module], type[TensorizedLayer[Any]]] = {
    nn.Conv2d: TensorizedConv2d,
    nn.Linear: TensorizedLinear,
    nn.Embedding: TensorizedEmbedding,
}
"""What takes the place of torch's layers."""


@dataclass(frozen=True)
class Weight:
    """A layer of a model that has a tensorized counterpart, or is one of its subclasses.

    Args:
        name: Qualified name of the layer.
        layer: The layer.
        reason: Why it has to stay as it is; None if it does not.
    """

    name: str
    layer: nn.Module
    reason: str | None


def find_weights(model: nn.Module) -> list[Weight]:
    """The convolutions, linear layers and embeddings of a model, each once, in the order of its modules.

    A layer stays dense if something else would notice its weight to be gone: another module that has the same
    parameter, a hook, a parametrization, a subclass with a forward pass of its own.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        >>> [(weight.name, weight.reason) for weight in find_weights(model)]
        [('0', None), ('2', 'has one input channel per group')]
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return [
        Weight(name, module, _reason(name, module, owners))
        for name, module in model.named_modules()
        if any(isinstance(module, kind) for kind in TENSORIZED)
    ]


def has_counterpart(layer: nn.Module) -> bool:
    """Whether there is a tensorized layer with all that this one does.

    Example:
        >>> has_counterpart(nn.Embedding(5, 4)), has_counterpart(nn.Embedding(5, 4, sparse=True))
        (True, False)
    """
    if type(layer) is nn.Embedding:
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
    return type(layer) in TENSORIZED


def _reason(name: str, layer: nn.Module, owners: Mapping[int, list[str]]) -> str | None:
    if type(layer) not in TENSORIZED:
        own = f"is a {type(layer).__name__}, a class of its own"
        return "is parametrized" if parametrize.is_parametrized(layer) else own
    weight = layer._parameters.get("weight")
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return "has a weight that is no floating-point parameter"
    others = [owner for owner in owners[id(weight)] if owner != (f"{name}.weight" if name else "weight")]
    if others:
        return f"shares its weight with {others[0]}"
    if name == "":
        return "is the model itself, and cannot be replaced within it"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(layer, hook) for hook in hooks):
        return "has hooks"
    if not has_counterpart(layer):
        return "has max_norm, scale_grad_by_freq or sparse gradients, which need a row of its own"
    if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.groups:
        return "has one input channel per group"
    return None
