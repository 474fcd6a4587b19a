"""How the contents of objects are copied, compared and put back, for each type of object."""

import random
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from operator import is_
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

_SEARCHED = 100
"""Lists and dicts with more items are remembered themselves, but not the objects in them."""

_COPIED = 2**18
"""Tensors and arrays with more elements are copied only once they are known to change."""

_MISSING = object()

V = TypeVar("V")


class Kind(NamedTuple):
    """How objects of one type are remembered."""

    copy: Callable[[Any], Any]
    """Copies the contents of an object; gives None for one that is not remembered."""
    changed: Callable[[Any, Any], Any]
    """Compares an object with such a copy; gives what is to be put back, None if nothing is."""
    put: Callable[[Any, Any], object]
    """Puts this back."""
    inside: Callable[[Any], Iterable[Any]] = lambda _: ()
    """The objects in a copy that are remembered as well."""


class Kinds:
    """The kind of every type, found once for each. Snapshots of the same modules share a table.

    Args:
        whole: With weights, buffers, submodules, hooks and modes of modules.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self._whole = whole
        self.module = WHOLE if whole else Kind(self._attributes, _changed_attributes, self._put_attributes, dict.values)
        """The kind of the modules that a snapshot begins with."""
        self.of = _Memo(self._find)
        """Kinds by type; None for a type whose objects do not change, such as numbers, or are not put back."""
        self.left_out = _Memo(_left_out)
        """For each class of modules the attributes that are not remembered."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles begin with an empty table."""
        return _new_kinds, (self._whole,)

    def is_metric(self, module: object) -> bool:
        """Whether a module is a metric, or one of torchmetrics' containers of metrics."""
        return self.of[type(module)] is self.module

    def _find(self, cls: type) -> Kind | None:
        kind = next((kind for base, kind in _KINDS.items() if issubclass(cls, base)), None)
        if issubclass(cls, nn.Module):
            metric = _base(cls, "torchmetrics.", "Metric") or cls.__module__.startswith("torchmetrics.")
            kind = self.module if self._whole or metric else kind
        if issubclass(cls, random.SystemRandom) or (issubclass(cls, nn.Parameter) and not self._whole):
            kind = None
        return kind

    def _attributes(self, module: nn.Module) -> "_Attributes":
        return _Attributes(module, self)

    def _put_attributes(self, module: nn.Module, held: dict[str, Any]) -> None:
        for name, value in held.items():
            among_modules = name in module._modules or self.is_metric(value)
            place: dict[str, Any] = module._modules if among_modules else vars(module)
            if value is _MISSING:
                place.pop(name, None)
            else:
                place[name] = value


def _new_kinds(whole: bool) -> Kinds:
    return Kinds(whole=whole)


class _Memo(dict[type, V]):
    """Values that a function gives for types, computed once for each."""

    def __init__(self, function: Callable[[type], V]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, cls: type) -> V:
        value = self[cls] = self._function(cls)
        return value


class _Attributes(dict[str, Any]):
    """The attributes of a module, and its metrics. Other submodules may belong to the optimizer and are left out."""

    def __init__(self, module: nn.Module, kinds: Kinds) -> None:
        own, left_out = vars(module), kinds.left_out[type(module)]
        super().__init__({name: value for name, value in own.items() if name not in left_out})
        self.total = len(own)
        self.kinds = kinds
        if module._modules:
            self.update((name, each) for name, each in module._modules.items() if kinds.is_metric(each))

    def are_of(self, module: nn.Module) -> bool:
        """Whether the module has exactly these."""
        own = vars(module)
        if module._modules or len(own) != self.total:
            return _same_entries(_Attributes(module, self.kinds), self)
        return all(map(is_, map(own.get, self, repeat(_MISSING)), self.values()))


def _changed_attributes(module: nn.Module, held: _Attributes) -> dict[str, Any] | None:
    if held.are_of(module):
        return None
    now = _Attributes(module, held.kinds)
    changed = [name for name in {**held, **now} if held.get(name, _MISSING) is not now.get(name, _MISSING)]
    return {name: held.get(name, _MISSING) for name in changed}


_CHANGED_BY_TORCHMETRICS = {
    *("_update_count", "_computed", "_forward_cache", "_cache", "_is_synced"),
    *("_to_sync", "_should_unsync", "_enable_grad", "_device", "_dtype"),
}


def _left_out(cls: type) -> frozenset[str]:
    """Attributes of a class of modules that torch, Lightning and torchmetrics use themselves."""
    if (metric := _base(cls, "torchmetrics.", "Metric")) is not None:
        bare = type("Bare", (metric,), {"update": lambda _: None, "compute": lambda _: None})
        return frozenset(vars(bare())) - _CHANGED_BY_TORCHMETRICS - {"training"}
    base = _base(cls, "lightning.", "LightningModule")
    own = vars(nn.Module()) if base is None else {**vars(base()), "_hparams": None, "_hparams_initial": None}
    return frozenset(own) - {"training"}


def _base(cls: type, package: str, name: str) -> type | None:
    """The base class of this name, from a package that is not imported here."""
    return next((each for each in cls.__mro__ if each.__name__ == name and each.__module__.startswith(package)), None)


# --- contents of objects ---------------------------------------------------------------------------------------


TensorCopy: TypeAlias = tuple[Tensor | None, int]
"""A copy, None for a large tensor, and torch's count of changes in place."""


def copy_of_tensor(tensor: Tensor, *, at_any_size: bool = False) -> TensorCopy | None:
    """A copy of a tensor; None for a tensor of inference mode, which counts no changes and is left alone."""
    if tensor.is_inference():
        return None
    return tensor.clone() if at_any_size or tensor.numel() <= _COPIED else None, tensor._version


def _changed_tensor(tensor: Tensor, held: TensorCopy) -> TensorCopy | None:
    return None if tensor._version == held[1] else held


def _put_tensor(tensor: Tensor, held: TensorCopy) -> None:
    copy = held[0]
    if copy is not None:
        (tensor if tensor.is_nested or tensor.shape == copy.shape else tensor.resize_(copy.shape)).copy_(copy)


def _few(items: Any) -> Iterable[Any]:
    return items if len(items) <= _SEARCHED else ()


def _unless(same: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    return lambda thing, held: None if same(thing, held) else held


def _same_items(one: Any, two: Any) -> bool:
    return len(one) == len(two) and all(map(is_, one, two))


def _same_entries(one: Any, two: Any) -> bool:
    return _same_items(one.values(), two.values()) and all(map(is_, one, two))


def _put_entries(entries: Any, held: Any) -> None:
    entries.clear()
    entries.update(held)


def _put_items(items: Any, held: Any) -> None:
    items.clear()
    items.extend(held)


def _copy_of_array(array: Any) -> Any:
    return array.copy() if array.size <= _COPIED and array.flags.writeable else None


def _inside_whole(held: dict[str, Any]) -> Iterable[Any]:
    """The objects in attributes, and all parameters, buffers and submodules, however many."""
    return chain(held.values(), *(held[own].values() for own in ("_parameters", "_buffers", "_modules") if own in held))


WHOLE = Kind(
    lambda module: dict(vars(module)),
    lambda module, held: None if _same_entries(vars(module), held) else held,
    lambda module, held: _put_entries(vars(module), held),
    _inside_whole,
)
TENSOR = Kind(copy_of_tensor, _changed_tensor, _put_tensor)
_KINDS: dict[type, Kind] = {
    Tensor: TENSOR,
    list: Kind(list, _unless(_same_items), _put_items, _few),
    deque: Kind(list, _unless(_same_items), _put_items, _few),
    set: Kind(set, _unless(set.__eq__), _put_entries),
    dict: Kind(dict, _unless(_same_entries), _put_entries, lambda entries: _few(entries.values())),
    tuple: Kind(tuple, lambda *_: None, lambda *_: None, _few),
    np.ndarray: Kind(
        _copy_of_array,
        _unless(lambda array, held: array.tobytes() == held.tobytes()),
        lambda array, held: array.__setitem__(..., held),
    ),
    torch.Generator: Kind(torch.Generator.get_state, lambda _, held: held, torch.Generator.set_state),
    np.random.Generator: Kind(
        lambda thing: thing.bit_generator.state,
        lambda _, held: held,
        lambda thing, held: setattr(thing.bit_generator, "state", held),
    ),
    np.random.RandomState: Kind(
        lambda thing: thing.get_state(), lambda _, held: held, lambda thing, held: thing.set_state(held)
    ),
    random.Random: Kind(lambda thing: thing.getstate(), lambda _, held: held, lambda thing, held: thing.setstate(held)),
}
