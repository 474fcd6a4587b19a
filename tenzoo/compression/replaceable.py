"""Which weights of a model can be made of cores."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from tenzoo.compression.holders import held_elsewhere
from tenzoo.compression.readers import readers_in_code
from tenzoo.factorizations import Rank
from tenzoo.layers import (
    Tensorization,
    TensorizedConv2d,
    TensorizedEmbedding,
    TensorizedLayer,
    TensorizedLinear,
    TensorizedWeight,
)
from tenzoo.state_dicts import Places

TENSORIZED: Mapping[type[nn.Module], type[TensorizedLayer[Any]]] = {
    nn.Conv2d: TensorizedConv2d,
    nn.Linear: TensorizedLinear,
    nn.Embedding: TensorizedEmbedding,
}
"""What takes the place of torch's layers."""

_LISTED: tuple[type[nn.Module], ...] = (*TENSORIZED, _ConvNd)
"""What a plan lists, be it to say why it stays dense."""

_READ_BY_NAME: Mapping[type[nn.Module], Callable[[str], bool]] = {
    nn.MultiheadAttention: lambda name: name.endswith("proj_weight") or name == "out_proj.weight",
    nn.TransformerEncoderLayer: lambda name: name in ("linear1.weight", "linear2.weight"),  # in its fast path
    nn.RNNBase: lambda name: name.startswith("weight_"),
    nn.RNNCellBase: lambda name: name.startswith("weight_"),
}
"""Which parameters torch's modules read by name, so that they have to stay where they are."""


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
"""Where a module keeps them."""


@dataclass(frozen=True)
class Weight:
    """A parameter of a model that can be made of cores, or could if nothing spoke against it.

    Args:
        name: Qualified name of the layer, or of the parameter where no layer can take the place of its module.
        owner: The module that has the parameter.
        parameter: Name of the parameter in it.
        is_layer: Whether a tensorized layer takes the place of the owner, and not a parametrization that of the
            parameter.
        reason: Why it has to stay as it is; None if it does not.
    """

    name: str
    owner: nn.Module
    parameter: str
    is_layer: bool
    reason: str | None

    @property
    def dense(self) -> Tensor:
        """The parameter, detached."""
        dense: Tensor = getattr(self.owner, self.parameter).detach()
        return dense

    @property
    def full_name(self) -> str:
        """Qualified name of the parameter."""
        return f"{self.name}.{self.parameter}" if self.is_layer and self.name else self.name or self.parameter

    @property
    def module_name(self) -> str:
        """Qualified name of the module that has the parameter."""
        return self.full_name.rpartition(".")[0]

    @property
    def trained(self) -> bool:
        """Whether the parameter has a gradient."""
        trained: bool = getattr(self.owner, self.parameter).requires_grad
        return trained

    def empty(
        self, *, factorization: str, rank: Rank, tensorization: Tensorization | None
    ) -> TensorizedLayer[Any] | TensorizedWeight:
        """What would take its place, on the meta device; arguments as those of the layers."""
        settings: dict[str, Any] = {"factorization": factorization, "rank": rank, "tensorization": tensorization}
        if self.is_layer:
            return TENSORIZED[type(self.owner)].empty_like(self.owner, **settings)
        rows, columns = self.dense.shape
        return TensorizedWeight((rows, columns), **settings, device="meta", dtype=self.dense.dtype)

    def decomposed(
        self,
        *,
        factorization: str,
        rank: Rank,
        tensorization: Tensorization | None,
        metric: Mapping[int, Tensor] | None = None,
    ) -> TensorizedLayer[Any] | TensorizedWeight:
        """What takes its place, with cores that approximate it; arguments as those of the layers."""
        settings: dict[str, Any] = {"factorization": factorization, "rank": rank, "tensorization": tensorization}
        if self.is_layer:
            return TENSORIZED[type(self.owner)].from_dense(self.owner, **settings, metric=metric)
        made = TensorizedWeight((*self.dense.shape,), **settings, device=self.dense.device, dtype=self.dense.dtype)
        made.right_inverse(self.dense)
        made.weight.requires_grad_(self.trained)
        return made.train(self.owner.training)


def find_weights(model: nn.Module, *, read: Mapping[str, str] | None = None) -> list[Weight]:
    """The weights of a model's convolutions, linear, attention and recurrent layers and embeddings, each once.

    They come in the order of the modules. A weight stays dense if something else would notice it to be gone: another
    module that has the same parameter, a hook, a parametrization, a subclass with a forward pass of its own. The matrix
    of a linear layer or an embedding that another module reads by name stays a parameter, as those of attention.

    Args:
        model: Any module; what ``torch.compile`` puts before names is left out.
        read: By full name, parameters that another module than their own reads, and which; beside those of which the
            code says so (see :func:`~tenzoo.compression.readers.readers_in_code`).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.RNN(8, 8))
        >>> [(weight.name, weight.reason) for weight in find_weights(model)]
        [('0', None), ('2', 'has one input channel per group'), ('3.weight_ih_l0', None), ('3.weight_hh_l0', None)]
    """
    check_module(model)
    modules = list(named_modules(model))
    for name, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"expected a model that is not scripted in `model`, got {name!r}, which is; script it after"
            )
        if any(isinstance(parameter, UninitializedParameter) for parameter in module._parameters.values()):
            raise ValueError(f"expected shapes in `model`, got {name!r}, which has none yet; run the model once")
    owners = Places(
        (_joined(name, key), tensor)
        for name, module in modules
        for named in (module.named_parameters, module.named_buffers)
        for key, tensor in named(recurse=False, remove_duplicate=False)
    )
    readers = readers_in_code(model)
    by_name = _read_by_name(model)
    held = held_elsewhere(modules)
    found: list[Weight] = []
    for name, module in modules:
        own = dict(module.named_parameters(recurse=False))
        keys = [key for key, value in own.items() if id(value) in by_name]
        reader = readers.get(id(own.get("weight"))) or (read or {}).get(_joined(name, "weight"))
        if not keys and reader and type(module) in (nn.Linear, nn.Embedding) and has_counterpart(module):
            keys = ["weight"]
        for key in keys:
            full = _joined(name, key)
            reason = _reason_of_parameter(module, key, full, owners) or held.get(id(own[key]))
            found.append(Weight(full, module, key, False, reason))
        if not keys and isinstance(module, _LISTED):
            reason = _reason_of_layer(name, module, owners)
            reason = reason or held.get(id(module)) or held.get(id(own.get("weight")))
            if reason is None and reader:
                reason = f"has a weight that {reader} reads"
            found.append(Weight(name, module, "weight", True, reason))
    return found


def own_parameters(weights: Sequence[Weight]) -> list[int]:
    """Number of each layer's parameters, or of a parameter's elements; what several share is the first one's."""
    met: set[Tensor] = set()
    numbers = []
    for weight in weights:
        everything = set(weight.owner.parameters(recurse=False))
        own = (everything if weight.is_layer else {getattr(weight.owner, weight.parameter)}) - met
        met |= own
        numbers.append(sum(parameter.numel() for parameter in own))
    return numbers


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, by its name without what ``torch.compile`` puts before it.

    Example:
        >>> [name for name, _ in named_modules(torch.compile(nn.Sequential(nn.Linear(3, 2))))]
        ['', '', '0']
    """
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def check_module(model: object) -> None:
    """Refuse what is no module.

    Raises:
        TypeError: If it is none.

    Example:
        >>> check_module("resnet18")
        Traceback (most recent call last):
        ...
        TypeError: expected an nn.Module in `model`, got a str
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module in `model`, got a {type(model).__name__}")


def _read_by_name(model: nn.Module) -> set[int]:
    return {
        id(parameter)
        for module in model.modules()
        for kind, reads in _READ_BY_NAME.items()
        if isinstance(module, kind)
        for name, parameter in module.named_parameters()
        if reads(name) and parameter.ndim == 2
    }


def has_counterpart(layer: nn.Module) -> bool:
    """Whether there is a tensorized layer with all that this one does.

    Example:
        >>> has_counterpart(nn.Embedding(5, 4)), has_counterpart(nn.Embedding(5, 4, sparse=True))
        (True, False)
    """
    if type(layer) is nn.Embedding:
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
    return type(layer) in TENSORIZED


def put_parametrization(owner: nn.Module, parameter: str, cores: TensorizedWeight) -> None:
    """Let a module read a parameter from cores that hold it already."""
    cores.place = list(owner._parameters).index(parameter)
    cores.right_inverse = lambda dense: ()  # type: ignore[method-assign]  # torch would decompose the parameter again
    try:
        # Unchecked, since cores may be made before their numbers are read.
        parametrize.register_parametrization(owner, parameter, cores, unsafe=True)
    finally:
        del cores.right_inverse
    if isinstance(owner, nn.RNNBase):
        type(owner).__deepcopy__ = _copied_recurrent  # type: ignore[attr-defined]


def _copied_recurrent(layer: nn.RNNBase, memo: dict[int, Any]) -> nn.RNNBase:
    """A copy without the list of rebuilt weights, which belong to the graph of the last forward pass."""
    if id(layer) not in memo:
        made: Any = layer.__new__(type(layer))
        memo[id(layer)] = made
        left_out = ("_flat_weights", "_flat_weight_refs")
        vars(made).update(copy.deepcopy({k: value for k, value in vars(layer).items() if k not in left_out}, memo))
        with torch.no_grad():
            made._init_flat_weights()
    copied: nn.RNNBase = memo[id(layer)]
    return copied


def take_parametrization(owner: nn.Module, parameter: str) -> None:
    """Give a module the dense parameter back that its cores stand for, at its place among the others.

    Of several parameters the one that was put last comes first.
    """
    cores: Any = owner.parametrizations[parameter][0]  # type: ignore[index]
    trained = any(core.requires_grad for core in cores.weight.cores)
    with torch.no_grad():
        dense = cores.dense_weight().clone()
    # Copies of a parametrized module share its class, which changes when the parametrization is removed.
    kind = type(owner)
    attributes = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    owner.__class__ = type(kind.__name__, kind.__bases__, attributes)
    parametrize.remove_parametrizations(owner, parameter)
    if parameter in owner._buffers:  # what needs no gradient is taken for a buffer
        del owner._buffers[parameter]
    setattr(owner, parameter, nn.Parameter(dense, requires_grad=trained))
    others = [name for name in owner._parameters if name != parameter]
    for name in [] if cores.place is None else others[cores.place :]:
        owner._parameters[name] = owner._parameters.pop(name)  # to the end


def _reason_of_layer(name: str, layer: nn.Module, owners: Places[str]) -> str | None:
    if type(layer) not in TENSORIZED:
        own = f"is a {type(layer).__module__}.{type(layer).__qualname__}, a class of its own"
        if type(layer).__module__.startswith("torch.nn."):
            own = f"is a {type(layer).__name__}, for which there is no tensorized layer"
        return "is parametrized" if parametrize.is_parametrized(layer) else own
    if reason := _reason_of_parameter(layer, "weight", f"{name}.weight" if name else "weight", owners):
        return reason
    if name == "":
        return "is the model itself, and cannot be replaced within it"
    if reason := _does_more(layer):
        return reason
    if set(layer._parameters) - {"weight", "bias"} or layer._buffers or layer._modules:
        return "has more than a weight and a bias"
    if not has_counterpart(layer):
        return "has max_norm, scale_grad_by_freq or sparse gradients, which need a row of its own"
    if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.groups:
        return "has one input channel per group"
    return None


def _does_more(layer: nn.Module) -> str | None:
    """What a module does beside that which its class does."""
    if any(getattr(layer, hooks, None) for hooks in _HOOKS):
        return "has hooks"
    return "has a forward pass of its own" if "forward" in vars(layer) else None


def not_foldable(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """What is made of cores, by name, where its dense counterpart would not do all that it does: that, and why."""
    modules = list(named_modules(model))
    held = held_elsewhere(modules)
    for name, module in modules:
        if not isinstance(module, TensorizedLayer | TensorizedWeight):
            continue
        parts: list[nn.Module | Tensor] = [*module.modules(), *module.weight.cores]
        reason = _does_more(module) or next((held[id(part)] for part in parts if id(part) in held), None)
        if isinstance(module, TensorizedWeight):
            path = [part for part in name.split(".")[:-1] if part != "parametrizations"]
            name, dense = ".".join(path), "Parameter"
        else:
            dense = type(module.to_dense()).__name__
            if type(module) not in TENSORIZED.values():
                reason = f"is a {type(module).__module__}.{type(module).__qualname__}, a class of its own"
            elif {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias", "padding_row"}:
                reason = "has more than a weight and a bias"
        if reason is not None:
            yield name, dense, reason


def _reason_of_parameter(owner: nn.Module, key: str, name: str, owners: Places[str]) -> str | None:
    parameter = owner._parameters.get(key)
    if parameter is None and isinstance(getattr(owner, key, None), Tensor):
        return "has a weight that is computed from others in a hook, as weight_norm does"
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
        return "has a weight that is no floating-point parameter"
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        return "has a weight with a hook on its gradient"
    others = [other for other in owners.of(parameter) if other != name]
    return f"shares its weight with {others[0]}" if others else None
