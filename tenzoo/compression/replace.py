"""Replacements put in the places of dense weights, and dense weights put back."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from tenzoo.compression.plans import Plan
from tenzoo.compression.replaceable import Replacement, Weight
from tenzoo.factorizations import without_dropout
from tenzoo.layers import TensorizedLayer, TensorizedWeight

M = TypeVar("M", bound=nn.Module)


@contextmanager
def put_in_place(model: nn.Module, plan: Plan, replacements: Sequence[tuple[Weight, Replacement]]) -> Iterator[None]:
    """Put layers and parametrizations in their places; if what follows fails, everything is as it was before."""
    _hold_budget(plan, replacements)
    children = [(module, dict(module._modules)) for module in model.modules()]
    owners = {weight.owner for weight, replacement in replacements if isinstance(replacement, TensorizedWeight)}
    parameters = [(owner, type(owner), dict(owner._parameters)) for owner in owners]
    try:
        for weight, replacement in replacements:
            replacement.train(weight.owner.training)
            if isinstance(replacement, TensorizedWeight):
                _put_parametrization(weight.owner, weight.parameter, replacement)
            else:
                hand_on_bias(weight.owner, replacement)
        replace_modules(model, {weight.owner: replacement for weight, replacement in replacements if weight.is_layer})
        yield
    except BaseException:
        for module, own in children:
            _set(module._modules, own)
        for owner, kind, dense in parameters:
            _undo_parametrizations(owner, kind, dense)
        raise


def _hold_budget(plan: Plan, replacements: Sequence[tuple[Weight, Replacement]]) -> None:
    """Contract layers with their cores in every batch, where the plan's budget counts on it."""
    layers = {layer.name: layer for layer in plan.layers}
    for weight, new in replacements:
        number, dense = layers[weight.name].multiplications, layers[weight.name].dense_multiplications
        if plan.counts == "multiplications" and isinstance(new, TensorizedLayer) and (number or 0) < (dense or 0):
            new.implementation = "contract"


def _undo_parametrizations(owner: nn.Module, kind: type[nn.Module], dense: Mapping[str, Any]) -> None:
    """Give a module its class and its parameters back."""
    for name in dense.keys() & vars(kind).keys():  # properties that were added to the class it had
        delattr(kind, name)
    owner.__class__ = kind
    _set(owner._parameters, dense)
    if isinstance(owner, nn.RNNBase):
        owner._init_flat_weights()


def _set(place: dict[str, Any], content: Mapping[str, Any]) -> None:
    place.clear()
    place.update(content)


def hand_on_bias(old: nn.Module, new: nn.Module) -> None:
    """Give a layer the bias of the layer that it replaces, itself: others may share it, and hooks may be on it."""
    if isinstance(bias := old._parameters.get("bias"), nn.Parameter):
        new.bias = bias


def replace_modules(model: M, new: Mapping[nn.Module, nn.Module]) -> M:
    """Replace modules of a model by others, under each of their names."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and child in new:
                parent._modules[key] = new[child]
    return model


# --- parametrizations ----------------------------------------------------------------------------------------------


def _put_parametrization(owner: nn.Module, parameter: str, cores: TensorizedWeight) -> None:
    """Let a module read a parameter from cores that were decomposed already."""
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
    """A copy without the list of reconstructed weights, which belong to the graph of the last forward pass."""
    if id(layer) not in memo:
        new: Any = layer.__new__(type(layer))
        memo[id(layer)] = new
        left_out = ("_flat_weights", "_flat_weight_refs")
        vars(new).update(copy.deepcopy({k: value for k, value in vars(layer).items() if k not in left_out}, memo))
        with torch.no_grad():
            new._init_flat_weights()
    copied: nn.RNNBase = memo[id(layer)]
    return copied


def take_parametrization(owner: nn.Module, parameter: str) -> None:
    """Give a module the dense parameter back that its cores reconstruct, at its place among the others.

    Where a module has several such parameters, call this for the last one first.
    """
    cores: Any = owner.parametrizations[parameter][0]  # type: ignore[index]
    trained = any(core.requires_grad for core in cores.factorization.cores)
    with torch.no_grad(), without_dropout(cores):
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
