"""Weights that updates are merged into, and what they were before."""

import copy
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tenzoo.adapters.updates import Update


class MergedUpdates:
    """The updates of one merge, as they are now: later changes of the adapters do not change what was merged.

    Args:
        updates: The updates, each with its scaling.
        transposed: Whether the weight has the layout ``(in_features, out_features)``.
        padding_idx: Row of the weight that no update changes.
    """

    def __init__(self, updates: list[tuple[Update, float]], *, transposed: bool, padding_idx: int | None) -> None:
        self._updates = [(copy.deepcopy(update), scaling) for update, scaling in updates]
        self._transposed, self._padding_idx = transposed, padding_idx

    def added_to(self, weight: Tensor) -> Tensor:
        """The weight with the updates, in the higher precision of both."""
        for update, scaling in self._updates:
            change = delta(update, scaling, transposed=self._transposed, padding_idx=self._padding_idx)
            weight = weight + change.to(weight.device)
        return weight


class MergedWeight:
    """A weight with updates, and its values without them. Layers that share the weight share this.

    Args:
        weight: The weight, before the first merge.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._before = weight.detach().clone()
        self._merged: list[MergedUpdates] = []
        self.enter()

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)  # of a copy
        self.enter()

    @classmethod
    def of(cls, weight: Tensor) -> "MergedWeight":
        """What the layers that have merged into this weight share, or a new one."""
        found = _known.get(_place(weight))
        if found is not None and _place(found._weight) == _place(weight):
            return found
        return cls(weight)

    def enter(self) -> None:
        """Be found by the other layers that have the weight, also after it was moved."""
        _known[_place(self._weight)] = self

    @torch.no_grad()
    def add_(self, updates: MergedUpdates, merged: Tensor, weight: Tensor) -> None:
        """Make the weight the merged one.

        Args:
            updates: What was merged.
            merged: The weight with them.
            weight: The weight of the layer.
        """
        weight.copy_(merged)
        self._merged.append(updates)

    @torch.no_grad()
    def remove_(self, removed: list[MergedUpdates], weight: Tensor) -> None:
        """Make the weight what it would be without some of the updates: without any, what it was, to the bit.

        Args:
            removed: The updates.
            weight: The weight of the layer.
        """
        self._merged = [updates for updates in self._merged if all(updates is not each for each in removed)]
        weight.copy_(self._before)
        for updates in self._merged:
            weight.copy_(updates.added_to(weight))


@torch.no_grad()
def delta(update: Update, scaling: float, *, transposed: bool, padding_idx: int | None) -> Tensor:
    """What an update adds to a weight, in the layout of the weight and the precision of the cores.

    Args:
        update: The update.
        scaling: What it is multiplied by.
        transposed: Whether the weight has the layout ``(in_features, out_features)``.
        padding_idx: Row of the weight that is not changed.
    """
    matrix = update.matrix() * scaling
    if transposed:
        matrix = matrix.t()
    if padding_idx is not None:
        matrix[padding_idx] = 0
    return matrix


_Place = tuple[object, ...]
_known: WeakValueDictionary[_Place, MergedWeight] = WeakValueDictionary()


def _place(weight: Tensor) -> _Place:
    """What tensors that share all numbers have in common."""
    address = id(weight) if weight.is_meta else weight.data_ptr()
    return weight.device, address, tuple(weight.shape), weight.stride()
