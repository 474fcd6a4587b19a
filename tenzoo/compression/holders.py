"""Plain attributes and hooks that lead to a layer or its weight: they would keep the old one after a replacement."""

import gc
import weakref
from collections.abc import Collection, Iterator
from contextlib import suppress
from types import FrameType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tenzoo.state_dicts import Places

_OWN = ("_modules", "_parameters", "_buffers", "_flat_weights", "_flat_weight_refs", "_cached", "sharpness_state")
"""Attributes in which modules of torch, tensorized layers and tasks keep their own objects."""

_OUTSIDE: tuple[type, ...] = (type, ModuleType, FrameType, Optimizer)
"""Classes of objects outside of the model that lead to it: code, running frames, and training."""

_WHOLE = ("lightning.", "pytorch_lightning.", "lightning_fabric.", "torch._dynamo.", "torch.fx.")
"""Packages with classes that hold the model as a whole; of Lightning, those that train."""


def held_elsewhere(modules: Collection[tuple[str, nn.Module]]) -> dict[int, str]:
    """By id, the modules and parameters that a plain attribute or a hook leads to, and the attribute.

    An attribute leads to everything that its object refers to: the items of a container, the attributes of an object of
    any class, the defaults, the closure and the bound object of a function, the contents of a cache. A tensor leads to
    all parameters whose memory it shares.

    Args:
        modules: The modules of a model, with their names.
    """
    found: dict[int, str] = {}
    own = {id(module) for _, module in modules}
    left_out = {id(vars(module)[key]) for _, module in modules for key in _OWN if key in vars(module)}
    places = Places((id(p), p) for _, module in modules for p in module.parameters(recurse=False))
    reached: dict[int, list[nn.Module | Tensor]] = {}
    for name, module in modules:
        if (wrapped := module._modules.get("_orig_mod")) is not None:  # its graph is bound to this very module
            found[id(wrapped)] = "is compiled by itself; compile it after"
        for key, value in vars(module).items():
            if key in _OWN:
                continue
            if id(value) not in reached:
                reached[id(value)] = list(_reached(value, own, left_out))
            reason = f"is also held by the plain attribute {f'{name}.{key}' if name else key!r}"
            for held in reached[id(value)]:
                if held is not module:
                    for each in places.of(held) if isinstance(held, Tensor) else [id(held)]:
                        found.setdefault(each, reason)
    return found


def _reached(value: Any, own: Collection[int], left_out: Collection[int]) -> Iterator[nn.Module | Tensor]:
    """Tensors and modules of the model that an object leads to; what these modules lead to is left out."""
    seen: set[int] = set()
    outside: dict[type, bool] = {}
    pending = [value]
    while pending:
        each = pending.pop()
        if id(each) in seen or id(each) in left_out or not gc.is_tracked(each):  # numbers and text lead nowhere
            continue
        seen.add(id(each))
        kind = type(each)  # and not the class that a proxy says it has
        if kind not in outside:
            outside[kind] = _is_outside(kind)
        if outside[kind]:
            continue
        if issubclass(kind, Tensor) or id(each) in own:
            yield each
        if id(each) not in own:
            pending += _referents(each)


def _referents(value: Any) -> list[Any]:
    kind = type(value)
    if kind is FunctionType:  # but for its globals
        return [value.__defaults__, value.__kwdefaults__, value.__closure__, vars(value)]
    if issubclass(kind, weakref.ref):
        return [value()]
    if kind in weakref.ProxyTypes:
        with suppress(ReferenceError):
            return [value.__init__.__self__]
        return []
    return gc.get_referents(value)


def _is_outside(kind: type) -> bool:
    """Whether objects of a class are outside of the model, though they lead to it."""
    if issubclass(kind, _OUTSIDE):
        return True
    bases = [base for base in kind.__mro__ if base.__module__.startswith(_WHOLE)]
    trains = any(base.__module__.startswith("torch.") or base.__name__ in ("Trainer", "Fabric") for base in bases)
    return trains and not issubclass(kind, nn.Module)
