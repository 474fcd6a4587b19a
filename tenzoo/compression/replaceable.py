"""Which weights of a model can be made of cores."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from tenzoo.compression.holders import held_elsewhere
from tenzoo.compression.reasons import counterparts, reason_of_layer, reason_of_parameter
from tenzoo.factorizations import Rank, factorization_class
from tenzoo.layers import (
    Tensorization,
    TensorizedLayer,
    TensorizedWeight,
)
from tenzoo.layers.tensorization import fits, whole_modes
from tenzoo.state_dicts import Places

Replacement: TypeAlias = TensorizedLayer[Any] | TensorizedWeight
"""A layer with cores for a dense layer, or a parametrization with cores for a parameter."""

_READ_BY_NAME: Mapping[type[nn.Module], Callable[[str], bool]] = {
    nn.MultiheadAttention: lambda name: name.endswith("proj_weight") or name == "out_proj.weight",
    nn.TransformerEncoderLayer: lambda name: name in ("linear1.weight", "linear2.weight"),
    nn.RNNBase: lambda name: name.startswith("weight_"),
    nn.RNNCellBase: lambda name: name.startswith("weight_"),
}
"""The parameters that torch's modules read by name, and that no layer can replace.

With layers as ``linear1`` and ``linear2``, torch's encoder would leave its fast path, which sets padding to 0.
"""


@dataclass(frozen=True)
class Weight:
    """A parameter of a model that is listed in a plan.

    Args:
        name: Qualified name of the layer, or of the parameter where no layer can replace its module.
        owner: The module that has the parameter.
        parameter: Name of the parameter in the module.
        is_layer: Whether a tensorized layer replaces the owner; otherwise a parametrization replaces the parameter.
        reason: Why the parameter has to stay dense; None if it can become cores.
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
        """Whether the parameter needs a gradient."""
        trained: bool = getattr(self.owner, self.parameter).requires_grad
        return trained

    def empty(self, *, factorization: str, rank: Rank, tensorization: Tensorization | None) -> Replacement:
        """The replacement on the meta device; arguments as those of the layers."""
        settings: dict[str, Any] = {"factorization": factorization, "rank": rank, "tensorization": tensorization}
        if self.is_layer:
            return counterparts()[type(self.owner)].empty_like(self.owner, **settings)
        rows, columns = self.dense.shape
        return TensorizedWeight((rows, columns), **settings, device="meta", dtype=self.dense.dtype)

    def whole_modes(self, factorization: str) -> Tensorization | None:
        """Both sizes as one mode each; None for a format that needs others."""
        return whole_modes(factorization_class(factorization), *self._sizes())

    def fits(self, factorization: str) -> bool:
        """Whether the weight can have a format; one of fixed order has no tensor for every layer."""
        return fits(factorization_class(factorization), *self._sizes())

    def _sizes(self) -> tuple[Mapping[str, int], int | None]:
        """The sizes of both sides, and the number of pixels of a kernel."""
        if not self.is_layer:
            rows, columns = self.dense.shape
            return {"out": rows, "in": columns}, None
        kernel_size = getattr(self.owner, "kernel_size", None)
        kernel = None if kernel_size is None else math.prod(kernel_size)
        return counterparts()[type(self.owner)].sides(self.owner), kernel

    def decomposed(
        self,
        *,
        factorization: str,
        rank: Rank,
        tensorization: Tensorization | None,
        metric: Mapping[int, Tensor] | None = None,
    ) -> Replacement:
        """The replacement with cores that approximate the weight; arguments as those of the layers.

        It is in training mode, in which it keeps no dense weight.
        """
        settings: dict[str, Any] = {"factorization": factorization, "rank": rank, "tensorization": tensorization}
        if self.is_layer:
            return counterparts()[type(self.owner)].from_dense(self.owner, **settings, metric=metric).train()
        replacement = TensorizedWeight((*self.dense.shape,), **settings, device="meta", dtype=self.dense.dtype)
        replacement = replacement.to_empty(device=self.dense.device)
        replacement.right_inverse(self.dense)
        replacement.factorization.requires_grad_(self.trained)
        return replacement


def find_weights(model: nn.Module) -> list[Weight]:
    """The weights of a model's convolutions, linear, attention and recurrent layers and embeddings, each once.

    They come in the order of the modules. A weight stays dense if something else depends on it: another module with the
    same parameter, a hook, a parametrization, a subclass with a forward pass of its own. The matrices of attention and
    recurrent layers stay parameters, since no layer can replace them.

    Args:
        model: Any module; names are without the prefix of ``torch.compile``.

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
    by_name = _read_by_name(model)
    held = held_elsewhere(modules)
    listed = (*counterparts(), _ConvNd)
    found: list[Weight] = []
    for name, module in modules:
        own = dict(module.named_parameters(recurse=False))
        keys = [key for key, value in own.items() if id(value) in by_name]
        for key in keys:
            full = _joined(name, key)
            reason = reason_of_parameter(module, key, full, owners) or held.get(id(own[key]))
            found.append(Weight(full, module, key, False, reason))
        if not keys and isinstance(module, listed) and not isinstance(module, TensorizedLayer):
            reason = reason_of_layer(name, module, owners)
            reason = reason or held.get(id(module)) or held.get(id(own.get("weight")))
            found.append(Weight(name, module, "weight", True, reason))
    return found


def own_parameters(weights: Sequence[Weight]) -> list[int]:
    """Number of parameters of each weight's layer, or of the weight alone; shared ones count for the first."""
    met: set[Tensor] = set()
    numbers = []
    for weight in weights:
        everything = set(weight.owner.parameters(recurse=False))
        own = (everything if weight.is_layer else {getattr(weight.owner, weight.parameter)}) - met
        met |= own
        numbers.append(sum(parameter.numel() for parameter in own))
    return numbers


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, with its name without the prefix of ``torch.compile``.

    Example:
        >>> [name for name, _ in named_modules(torch.compile(nn.Sequential(nn.Linear(3, 2))))]
        ['', '', '0']
    """
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def described(name: str, module: nn.Module) -> str:
    """A module for an error message."""
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def check_module(model: object, argument: str = "model") -> None:
    """Refuse what is no module.

    Args:
        model: The argument.
        argument: Its name, for the error.

    Raises:
        TypeError: If it is none.

    Example:
        >>> check_module("resnet18")
        Traceback (most recent call last):
        ...
        TypeError: expected an nn.Module in `model`, got a str
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module in `{argument}`, got a {type(model).__name__}")


def _read_by_name(model: nn.Module) -> set[int]:
    return {
        id(parameter)
        for module in model.modules()
        for kind, reads in _READ_BY_NAME.items()
        if isinstance(module, kind)
        for name, parameter in module.named_parameters()
        if reads(name) and parameter.ndim == 2
    }
