"""Why a weight has to stay dense."""

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from tenzoo.layers import (
    TensorizedConv1d,
    TensorizedConv2d,
    TensorizedConv3d,
    TensorizedConvTranspose1d,
    TensorizedConvTranspose2d,
    TensorizedConvTranspose3d,
    TensorizedEmbedding,
    TensorizedEmbeddingBag,
    TensorizedLayer,
    TensorizedLinear,
)
from tenzoo.state_dicts import Places

TENSORIZED: Mapping[type[nn.Module], type[TensorizedLayer[Any]]] = {
    nn.Conv1d: TensorizedConv1d,
    nn.Conv2d: TensorizedConv2d,
    nn.Conv3d: TensorizedConv3d,
    nn.ConvTranspose1d: TensorizedConvTranspose1d,
    nn.ConvTranspose2d: TensorizedConvTranspose2d,
    nn.ConvTranspose3d: TensorizedConvTranspose3d,
    nn.Linear: TensorizedLinear,
    nn.Embedding: TensorizedEmbedding,
    nn.EmbeddingBag: TensorizedEmbeddingBag,
}
"""The tensorized layers that replace torch's."""


def counterparts() -> Mapping[type[nn.Module], type[TensorizedLayer[Any]]]:
    """The tensorized layers by the dense layers that they replace, with those of libraries that are imported."""
    if not hasattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D"):
        return TENSORIZED
    from tenzoo.layers.hugging_face import TensorizedTransposedLinear

    return {**TENSORIZED, TensorizedTransposedLinear.dense_class: TensorizedTransposedLinear}


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Where a module keeps its hooks."""


def has_counterpart(layer: nn.Module) -> bool:
    """Whether a tensorized layer does everything that this layer does.

    Example:
        >>> has_counterpart(nn.Embedding(5, 4)), has_counterpart(nn.Embedding(5, 4, sparse=True))
        (True, False)
    """
    if type(layer) is nn.Embedding or type(layer) is nn.EmbeddingBag:
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
    return type(layer) in counterparts()


def reason_of_layer(name: str, layer: nn.Module, owners: Places[str]) -> str | None:
    """Why no tensorized layer can replace a layer.

    Args:
        name: Qualified name of the layer.
        layer: A layer with a weight.
        owners: Where the parameters and buffers of the model lie in memory, by their names.
    """
    if type(layer) not in counterparts():
        own = f"is a {type(layer).__module__}.{type(layer).__qualname__}, a class of its own"
        if type(layer).__module__.startswith("torch.nn."):
            own = f"is a {type(layer).__name__}, for which there is no tensorized layer"
        return "is parametrized" if parametrize.is_parametrized(layer) else own
    if reason := reason_of_parameter(layer, "weight", f"{name}.weight" if name else "weight", owners):
        return reason
    if name == "":
        return "is the model itself, and cannot be replaced within it"
    if reason := does_more(layer):
        return reason
    if set(layer._parameters) - {"weight", "bias"} or layer._buffers or layer._modules:
        return "has more than a weight and a bias"
    if not has_counterpart(layer):
        return "has max_norm, scale_grad_by_freq or sparse gradients, which need a row of its own"
    if isinstance(layer, _ConvNd) and layer.in_channels == layer.groups:
        return "has one input channel per group"
    return None


def does_more(layer: nn.Module) -> str | None:
    """What a module does that its class does not; None if nothing."""
    if any(getattr(layer, hooks, None) for hooks in _HOOKS):
        return "has hooks"
    return "has a forward pass of its own" if "forward" in vars(layer) else None


def reason_of_parameter(owner: nn.Module, key: str, name: str, owners: Places[str]) -> str | None:
    """Why a parameter cannot become cores.

    Args:
        owner: The module that has the parameter.
        key: Name of the parameter in the module.
        name: Qualified name of the parameter.
        owners: Where the parameters and buffers of the model lie in memory, by their names.
    """
    parameter = owner._parameters.get(key)
    if parameter is None and isinstance(getattr(owner, key, None), Tensor):
        return "has a weight that is computed from others in a hook, as weight_norm does"
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
        return "has a weight that is no floating-point parameter"
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        return "has a weight with a hook on its gradient"
    others = [other for other in owners.of(parameter) if other != name]
    return f"shares its weight with {others[0]}" if others else None
