"""Snapshots of the objects in modules' attributes."""

from collections.abc import Container, Iterable
from typing import Any, TypeAlias

import torch
from torch import nn

from tenzoo.snapshot.kinds import TENSOR, Kind, Kinds, copy_of_tensor

Row: TypeAlias = tuple[Any, Kind, Any]
"""An object, its kind, and a copy of its contents."""

_unseen = torch._C.DisableTorchFunction
"""Hides operations from modes that follow the operations on tensors."""


class Snapshot:
    """The contents of modules' attributes, and of the lists, dicts, arrays, tensors, generators and metrics in them.

    Objects stay the same, and their contents are put back. Weights, and modules other than metrics, are left alone
    unless ``whole``.

    Args:
        modules: The modules whose attributes are remembered. Those of submodules are not, except for metrics.
        changing: Tensors to copy at any size, by ``id``.
        whole: Remember weights, buffers, submodules, hooks and modes too, of all modules that are found.
        kinds: A table to share with other snapshots that are not ``whole``, which saves time.

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

    def __init__(
        self,
        modules: Iterable[nn.Module],
        changing: Container[int] = (),
        *,
        whole: bool = False,
        kinds: Kinds | None = None,
    ) -> None:
        self.rows: dict[int, Row] = {}
        self._kinds = Kinds(whole=whole) if kinds is None else kinds
        self._search([(each, self._kinds.module) for each in modules], changing)

    def _search(self, todo: list[tuple[Any, Kind]], changing: Container[int]) -> None:
        kinds = self._kinds.of
        with torch.no_grad(), _unseen():
            while todo:
                thing, kind = todo.pop()
                key = id(thing)
                if key not in self.rows:
                    held = copy_of_tensor(thing, at_any_size=key in changing) if kind is TENSOR else kind.copy(thing)
                    self.rows[key] = thing, kind, held
                    todo += [(each, found) for each in kind.inside(held) if (found := kinds[type(each)]) is not None]

    def renew(self) -> None:
        """Take the current contents of the objects that have changed, tensors of any size included."""
        changed = self.changed()
        keys = {id(thing) for thing, *_ in changed}
        for key in keys:
            del self.rows[key]
        self._search([(thing, kind) for thing, kind, _ in changed], keys)

    def changed(self) -> list[Row]:
        """The objects whose contents are others now, with those that are remembered."""
        return [
            (thing, kind, back)
            for thing, kind, held in self.rows.values()
            if held is not None and (back := kind.changed(thing, held)) is not None
        ]


def put(rows: Iterable[Row]) -> list[Row]:
    """Put contents back into objects; returned is what undoes that."""
    undo = []
    with torch.no_grad(), _unseen():
        for thing, kind, held in rows:
            now = copy_of_tensor(thing, at_any_size=held[0] is not None) if kind is TENSOR else kind.copy(thing)
            kind.put(thing, held)
            if (back := kind.changed(thing, now)) is not None:
                undo.append((thing, kind, back))
    return undo
