"""Tensor completion: a tensor known at some entries, modeled by a factorization of the whole."""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tenzoo.cores import CoreContainer
from tenzoo.factorizations import Factorization, FactorizationName, Rank, factorization_class
from tenzoo.factorizations.gather import first_outside, never_changes
from tenzoo.memory import free_memory, in_gigabytes

_GATHERS_PER_CELL = 4
"""To reconstruct a cell costs as much as to gather about this many core elements, forward and backward."""
_FEW_CELLS = 2**16
"""Tensors with at most this many cells are always reconstructed: the calls take longer than the cells."""
_MAX_CELLS = 2**26
"""Tensors with more cells are never reconstructed: 256 MB in float32, and as much for the gradient."""

TRAINED_BYTES = 4 * 4
"""Bytes of a parameter in float32: its value, its gradient, and two moments."""


class TensorCompletion(nn.Module, CoreContainer):
    """A factorized tensor that predicts entries at given indices, ``x̂ = location + scale · T[index]``.

    Time and memory depend on the number of indices. The tensor is reconstructed only if it is small, or if most of its
    entries are asked for.

    Args:
        shape: Mode sizes of the tensor.
        factorization: ``"cp"``, ``"tucker"``, ``"tt"``, ``"tr"`` or ``"btt"``.
        rank: As the factorization takes it: one number, a list, or a fraction of the number of cells.
        init_std: Root mean square of the tensor's entries at initialization (``init="normal"``).
        init: ``"normal"``, or ``"uniform"`` for cores drawn from U(0, 1), as in arXiv:2508.10435.
        biases: Whether each index of each mode has a number of its own, ``x̂ = location + scale · (T[index] + Σ_k
            b_k[index_k])``, which starts at 0. They are no cores.
        interactions: Groups of modes, such as ``[[0, 1], [0, 2]]``: T is the sum of a factorized tensor of each group,
            of this ``rank`` (Rendle & Schmidt-Thieme 2010, "Pairwise interaction tensor factorization").
        clips: Whether predictions in evaluation mode are kept between the buffers ``low`` and ``high``.

    Raises:
        ValueError: For a shape, format, rank or ``init`` that is not valid, or a model that does not fit into memory.

    Example:
        >>> model = TensorCompletion((4, 3, 2), "tucker", 2)
        >>> index = torch.tensor([[0, 0, 0], [3, 2, 1]])
        >>> torch.allclose(model(index), model.tensor.reconstruct()[index.unbind(1)])
        True
    """

    location: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        factorization: FactorizationName,
        rank: Rank,
        *,
        init_std: float = 1.0,
        init: Literal["normal", "uniform"] = "normal",
        biases: bool = False,
        interactions: Sequence[Sequence[int]] | None = None,
        clips: bool = False,
    ) -> None:
        super().__init__()
        if init not in ("normal", "uniform"):
            raise ValueError(f"expected 'normal' or 'uniform' in `init`, got {init!r}")
        self.shape = tuple(shape)
        kind = factorization_class(factorization)
        groups = _groups_of(shape, interactions)
        shapes = [tuple(shape[mode] for mode in group) for group in groups]
        _check_memory(shape, rank, num_parameters(shape, factorization, rank, interactions=interactions))
        std = init_std / math.sqrt(len(groups))
        tensors = [kind(each, rank, init_std=std) for each in shapes]
        if interactions is None:
            (self.tensor,) = tensors
        else:
            self.interactions = nn.ModuleList(tensors)
        self._groups, self._whole = groups, interactions is None
        if init == "uniform":
            for core in [core for tensor in tensors for core in tensor.cores]:
                nn.init.uniform_(core)
        self.register_buffer("location", torch.tensor(0.0))
        self.register_buffer("scale", torch.tensor(1.0))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(size, 1)) for size in shape) if biases else None
        self.clips = clips
        if clips:
            self.register_buffer("low", torch.tensor(-math.inf))
            self.register_buffer("high", torch.tensor(math.inf))
        self.sparse_grad = False
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def tensors(self) -> list[Factorization]:
        """The tensors whose sum the entries are: one of all modes, or one for each group of modes."""
        found = [self.tensor] if self._whole else list(self.interactions)
        return cast("list[Factorization]", found)

    def reconstructs(self, num_entries: int) -> bool:
        """Whether the model reconstructs the tensor for a batch of this many entries, because that is faster.

        Tensors of groups of modes are not.
        """
        if not self._whole:
            return False
        gathers, cells = num_entries * self.tensors[0].elements_per_entry, math.prod(self.shape)
        return cells <= min(_MAX_CELLS, max(_FEW_CELLS, gathers // _GATHERS_PER_CELL))

    def forward(self, index: Tensor) -> Tensor:
        """Predict entries.

        Args:
            index: Integers, shape ``(N, order)``.

        Returns:
            Values in the units of the data, shape ``(N,)``.

        Raises:
            IndexError: If an index on the CPU is out of range.
        """
        if self.reconstructs(len(index)) and not self.sparse_grad:
            values = self.tensor.reconstruct().flatten().index_select(0, self._cells_at(index))
        else:
            first, *others = (
                self._entries(tensor, index, modes) for tensor, modes in zip(self.tensors, self._groups, strict=True)
            )
            values = sum(others, first)
        values = values.to(self.location.dtype)  # near a large location the numbers of a half type are far apart
        for mode, bias in zip(index.unbind(1), self.biases or (), strict=False):
            values = values + F.embedding(mode, bias, sparse=self.sparse_grad).squeeze(1)
        values = torch.addcmul(self.location, self.scale, values)
        return values.clamp(self.low, self.high) if self.clips and not self.training else values

    def _entries(self, tensor: Factorization, index: Tensor, modes: Sequence[int]) -> Tensor:
        own = index if len(modes) == index.shape[1] else index[:, list(modes)]
        return tensor.entries(own, sparse_grad=self.sparse_grad)

    def _cells_at(self, index: Tensor) -> Tensor:
        """Positions in the flattened tensor. They are cached for an index that never changes."""
        if not never_changes(index):
            return self._positions(index)
        if self._last is None or self._last[0] is not index:
            self._last = (index, self._positions(index))
        return self._last[1]

    def _positions(self, index: Tensor) -> Tensor:
        modes, shape = index.unbind(1), self.shape
        if index.is_cpu and (outside := first_outside(modes, shape)):
            raise IndexError(outside)  # else another cell would be read
        cells = modes[0]
        for mode, size in zip(modes[1:], shape[1:], strict=True):
            cells = torch.add(mode, cells, alpha=size)
        return cells


def num_parameters(
    shape: Sequence[int],
    factorization: FactorizationName,
    rank: Rank,
    *,
    interactions: Sequence[Sequence[int]] | None = None,
    **_: object,
) -> int:
    """Numbers in the cores of a :class:`TensorCompletion` of these arguments; others do not change it.

    Example:
        >>> num_parameters((4, 3, 2), "cp", 2), num_parameters((4, 3, 2), "cp", 2, interactions=[[0, 1], [0, 2]])
        (18, 26)
    """
    kind = factorization_class(factorization)
    return sum(kind.num_parameters([shape[mode] for mode in group], rank) for group in _groups_of(shape, interactions))


def _groups_of(shape: Sequence[int], interactions: Sequence[Sequence[int]] | None) -> list[tuple[int, ...]]:
    return [tuple(range(len(shape)))] if interactions is None else check_interactions(interactions, len(shape))


def check_interactions(groups: object, order: int | None = None) -> list[tuple[int, ...]]:
    """Groups of modes.

    Raises:
        TypeError: If they are not lists of integers.
        ValueError: If a group has fewer than two modes or one twice, two are equal, or a mode is not there.

    Example:
        >>> check_interactions([[0, 1], [2, 0]], 3)
        [(0, 1), (2, 0)]
    """
    if not isinstance(groups, Sequence) or isinstance(groups, str) or not groups:
        raise TypeError(f"expected a list of lists of modes in `interactions`, got {groups!r}")
    for group in groups:
        whole = isinstance(group, Sequence) and all(
            isinstance(mode, int) and not isinstance(mode, bool) for mode in group
        )
        if not whole or isinstance(group, str):
            raise TypeError(f"expected lists of modes in `interactions`, got {group!r}")
        if len(group) < 2 or len(set(group)) < len(group) or min(group) < 0:
            raise ValueError(
                f"expected two or more different modes from 0 on in each of `interactions`, got {[*group]}"
            )
        if order is not None and max(group) >= order:
            raise ValueError(f"expected modes from 0 to {order - 1} in `interactions`, got {[*group]}")
    if len({frozenset(group) for group in groups}) < len(groups):
        raise ValueError(f"expected different groups of modes in `interactions`, got {[[*group] for group in groups]}")
    if order is not None and len(groups) > 1 and any(len(group) == order for group in groups):
        raise ValueError(
            f"expected smaller groups than all {order} modes in `interactions`, got {[[*g] for g in groups]}"
        )
    return [tuple(group) for group in groups]


def _check_memory(shape: Sequence[int], rank: Rank, num_parameters: int) -> None:
    """Refuse a model whose training needs more memory than there is."""
    needed, free = TRAINED_BYTES * num_parameters, free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"expected a model to fit into memory, {in_gigabytes(free)} of it free, in `rank`, got {rank} for "
            f"{' × '.join(map(str, shape))}: {num_parameters} parameters, {in_gigabytes(needed)} with gradients and an "
            "optimizer's state; number the indices of each mode without gaps, or lower `rank`"
        )
