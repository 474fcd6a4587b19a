"""What modules hold besides weights and buffers: remembered, and put back in place."""

import random
from collections import deque
from collections.abc import Callable, Container, Iterable
from functools import cache
from itertools import chain, repeat
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

_SEARCHED = 100
"""Of longer lists and dicts the items are remembered, and not what the items hold."""

_COPIED = 2**18
"""Elements of the largest tensor or array that is copied before it is known to change."""

_MISSING = object()


def is_metric(module: object) -> bool:
    """Whether it is a metric, or one of torchmetrics' containers of metrics."""
    return _FOUND[type(module)] is _MODULE


Row: TypeAlias = "tuple[Any, _Kind, Any]"
"""An object, how its kind is remembered, and what it held."""


class Snapshot:
    """What modules hold in attributes, and what the lists, dicts, arrays, tensors, generators and metrics there hold.

    Objects stay the same ones: their contents are put back. Weights, and modules other than metrics, are left alone
    unless ``whole``.

    Args:
        modules: Whose attributes; those of submodules are not searched, except for metrics.
        changing: Tensors to copy at any size, by ``id``.
        whole: With weights, buffers, submodules, hooks and modes, and those of all modules that are found.

    Example:
        >>> class Counter(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.sums = {"all": torch.zeros(2)}
        >>> counter = Counter()
        >>> before = Snapshot([counter])
        >>> _ = counter.sums["all"].add_(1), counter.sums.update(last=1.0)
        >>> after = put(before.changed())
        >>> counter.sums
        {'all': tensor([0., 0.])}
        >>> _ = put(after)
        >>> counter.sums
        {'all': tensor([1., 1.]), 'last': 1.0}
    """

    def __init__(self, modules: Iterable[nn.Module], changing: Container[int] = (), *, whole: bool = False) -> None:
        self.rows: dict[int, Row] = {}
        self._kinds = _FOUND_WHOLE if whole else _FOUND
        self._search([(each, _WHOLE if whole else _MODULE) for each in modules], changing)

    def _search(self, todo: "list[tuple[Any, _Kind]]", changing: Container[int]) -> None:
        with torch.no_grad(), _unseen():
            while todo:
                thing, kind = todo.pop()
                key = id(thing)
                if key not in self.rows:
                    held = _copied(thing, key in changing) if kind is _TENSOR else kind.copy(thing)
                    self.rows[key] = thing, kind, held
                    kinds = self._kinds
                    todo += [(each, found) for each in kind.inside(held) if (found := kinds[type(each)]) is not None]

    def renew(self) -> None:
        """Remember what has changed as it is now, tensors at any size."""
        changed = self.changed()
        keys = {id(thing) for thing, *_ in changed}
        for key in keys:
            del self.rows[key]
        self._search([(thing, kind) for thing, kind, _ in changed], keys)

    def changed(self) -> list[Row]:
        """The objects that hold something else now, with what they held."""
        return [
            (thing, kind, back)
            for thing, kind, held in self.rows.values()
            if held is not None and (back := kind.changed(thing, held)) is not None
        ]


def put(rows: Iterable[Row]) -> list[Row]:
    """Let objects hold what they held; returned is what undoes that."""
    undo = []
    with torch.no_grad(), _unseen():
        for thing, kind, held in rows:
            now = _copied(thing, held[0] is not None) if kind is _TENSOR else kind.copy(thing)
            kind.put(thing, held)
            if (back := kind.changed(thing, now)) is not None:
                undo.append((thing, kind, back))
    return undo


_unseen = torch._C.DisableTorchFunction
"""By modes that follow what is done with tensors."""


class _Kind(NamedTuple):
    """How objects of a type are remembered."""

    copy: Callable[[Any], Any]  # None for one that is not remembered
    changed: Callable[[Any, Any], Any]  # what is to be put back of a copy, None if nothing is
    put: Callable[[Any, Any], object]
    inside: Callable[[Any], Iterable[Any]] = lambda _: ()


def _few(items: Any) -> Iterable[Any]:
    return items if len(items) <= _SEARCHED else ()


def _unless(same: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    return lambda thing, held: None if same(thing, held) else held


def _same_items(one: Any, two: Any) -> bool:
    return len(one) == len(two) and all(map(is_, one, two))


def _same_entries(one: Any, two: Any) -> bool:
    return _same_items(one.values(), two.values()) and all(map(is_, one, two))


class _Names(dict[str, Any]):
    """Attributes of a module, and its metrics: other submodules may have been given to the optimizer."""

    def __init__(self, module: nn.Module) -> None:
        own, passed = vars(module), _passed(type(module))  # type: ignore[arg-type]
        super().__init__({name: value for name, value in own.items() if name not in passed})
        self.total = len(own)
        if module._modules:
            self.update((name, each) for name, each in module._modules.items() if is_metric(each))

    def are_of(self, module: nn.Module) -> bool:
        """Whether the module has these and no others."""
        own = vars(module)
        if module._modules or len(own) != self.total:
            return _same_entries(_Names(module), self)
        return all(map(is_, map(own.get, self, repeat(_MISSING)), self.values()))


def _changed_names(module: nn.Module, held: _Names) -> dict[str, Any] | None:
    if held.are_of(module):
        return None
    now = _Names(module)
    changed = [name for name in {**held, **now} if held.get(name, _MISSING) is not now.get(name, _MISSING)]
    return {name: held.get(name, _MISSING) for name in changed}


def _put_names(module: nn.Module, held: dict[str, Any]) -> None:
    for name, value in held.items():
        place: dict[str, Any] = module._modules if name in module._modules or is_metric(value) else vars(module)
        if value is _MISSING:
            place.pop(name, None)
        else:
            place[name] = value


_STATE = {
    *("_update_count", "_computed", "_forward_cache", "_cache", "_is_synced"),
    *("_to_sync", "_should_unsync", "_enable_grad", "_device", "_dtype"),
}
"""What torchmetrics changes of a metric."""


@cache
def _passed(cls: type) -> frozenset[str]:
    """Attributes that torch, Lightning and torchmetrics keep for themselves."""
    if (metric := _base(cls, "torchmetrics.", "Metric")) is not None:
        bare = type("Bare", (metric,), {"update": lambda _: None, "compute": lambda _: None})
        return frozenset(vars(bare())) - _STATE - {"training"}
    base = _base(cls, "lightning.", "LightningModule")
    own = vars(nn.Module()) if base is None else {**vars(base()), "_hparams": None, "_hparams_initial": None}
    return frozenset(own) - {"training"}


def _base(cls: type, package: str, name: str) -> type | None:
    """The base of this name, of a package that is not imported here: who has such an object has it imported."""
    return next((each for each in cls.__mro__ if each.__name__ == name and each.__module__.startswith(package)), None)


_Copied: TypeAlias = tuple[Tensor | None, int]
"""A copy, None if none was made, and torch's number of the tensor's version."""


def _copied(tensor: Tensor, at_any_size: bool = False) -> _Copied | None:
    if tensor.is_inference():  # which has no version, and does not change
        return None
    return tensor.clone() if at_any_size or tensor.numel() <= _COPIED else None, tensor._version


def _changed_tensor(tensor: Tensor, held: _Copied) -> _Copied | None:
    return None if tensor._version == held[1] else held


def _put_tensor(tensor: Tensor, held: _Copied) -> None:
    copy = held[0]
    if copy is not None:
        (tensor if tensor.is_nested or tensor.shape == copy.shape else tensor.resize_(copy.shape)).copy_(copy)


def _put_entries(entries: Any, held: Any) -> None:
    entries.clear()
    entries.update(held)


def _put_items(items: Any, held: Any) -> None:
    items.clear()
    items.extend(held)


def _copied_array(array: Any) -> Any:
    return array.copy() if array.size <= _COPIED and array.flags.writeable else None


def _inside_whole(held: dict[str, Any]) -> Iterable[Any]:
    """What attributes hold, and all parameters, buffers and submodules, be they few or many."""
    return chain(held.values(), *(held[own].values() for own in ("_parameters", "_buffers", "_modules") if own in held))


_MODULE = _Kind(_Names, _changed_names, _put_names, dict.values)
_WHOLE = _Kind(
    lambda module: dict(vars(module)),
    lambda module, held: None if _same_entries(vars(module), held) else held,
    lambda module, held: _put_entries(vars(module), held),
    _inside_whole,
)
_TENSOR = _Kind(_copied, _changed_tensor, _put_tensor)
_KINDS: dict[type, _Kind] = {
    Tensor: _TENSOR,
    list: _Kind(list, _unless(_same_items), _put_items, _few),
    deque: _Kind(list, _unless(_same_items), _put_items, _few),
    set: _Kind(set, _unless(set.__eq__), _put_entries),
    dict: _Kind(dict, _unless(_same_entries), _put_entries, lambda entries: _few(entries.values())),
    tuple: _Kind(tuple, lambda *_: None, lambda *_: None, _few),
    np.ndarray: _Kind(
        _copied_array,
        _unless(lambda array, held: array.tobytes() == held.tobytes()),
        lambda array, held: array.__setitem__(..., held),
    ),
    torch.Generator: _Kind(torch.Generator.get_state, lambda _, held: held, torch.Generator.set_state),
    np.random.Generator: _Kind(
        lambda thing: thing.bit_generator.state,
        lambda _, held: held,
        lambda thing, held: setattr(thing.bit_generator, "state", held),
    ),
    np.random.RandomState: _Kind(
        lambda thing: thing.get_state(), lambda _, held: held, lambda thing, held: thing.set_state(held)
    ),
    random.Random: _Kind(
        lambda thing: thing.getstate(), lambda _, held: held, lambda thing, held: thing.setstate(held)
    ),
}


class _Found(dict[type, _Kind | None]):
    """Kinds by types; None for what does not change, such as a number, or is none of ours to put back."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self._whole = whole

    def __missing__(self, cls: type) -> _Kind | None:
        kind = next((kind for base, kind in _KINDS.items() if issubclass(cls, base)), None)
        if issubclass(cls, nn.Module):
            metric = _base(cls, "torchmetrics.", "Metric") or cls.__module__.startswith("torchmetrics.")
            kind = _WHOLE if self._whole else _MODULE if metric else kind
        if issubclass(cls, random.SystemRandom) or (issubclass(cls, nn.Parameter) and not self._whole):
            kind = None
        self[cls] = kind
        return kind


_FOUND, _FOUND_WHOLE = _Found(whole=False), _Found(whole=True)
