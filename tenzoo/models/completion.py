"""Tensor completion: a tensor known at some entries, modeled by a factorization of the whole."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tenzoo.cores import CoreContainer
from tenzoo.factorizations import FactorizationName, Rank, factorization_class
from tenzoo.factorizations.gather import first_outside, never_changes
from tenzoo.memory import free_memory, in_gigabytes

_GATHERS_PER_CELL = 4
"""To reconstruct a cell costs as much as to gather about this many core elements, forward and backward."""
_FEW_CELLS = 2**16
"""Tensors with at most this many cells are always reconstructed: the calls take longer than the cells."""
_MAX_CELLS = 2**26
"""Tensors with more cells are never reconstructed: 256 MB in float32, and as much for the gradient."""

_TRAINED_BYTES = 4 * 4
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

    def __init__(
        self,
        shape: Sequence[int],
        factorization: FactorizationName,
        rank: Rank,
        *,
        init_std: float = 1.0,
        init: Literal["normal", "uniform"] = "normal",
    ) -> None:
        super().__init__()
        if init not in ("normal", "uniform"):
            raise ValueError(f"expected 'normal' or 'uniform' in `init`, got {init!r}")
        kind = factorization_class(factorization)
        _check_memory(shape, rank, kind.num_parameters(shape, rank))
        self.tensor = kind(shape, rank, init_std=init_std)
        if init == "uniform":
            for core in self.tensor.cores:
                nn.init.uniform_(core)
        self.register_buffer("location", torch.tensor(0.0))
        self.register_buffer("scale", torch.tensor(1.0))
        self.sparse_grad = False
        self._cells = math.prod(self.tensor.shape)
        self._last: tuple[Tensor, Tensor] | None = None

    def reconstructs(self, num_entries: int) -> bool:
        """Whether the model reconstructs the tensor for a batch of this many entries, because that is faster."""
        gathers = num_entries * self.tensor.elements_per_entry
        return self._cells <= min(_MAX_CELLS, max(_FEW_CELLS, gathers // _GATHERS_PER_CELL))

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
            values = self.tensor.entries(index, sparse_grad=self.sparse_grad)
        # Near a large location the numbers of a half type are far apart.
        return torch.addcmul(self.location, self.scale, values.to(self.location.dtype))

    def _cells_at(self, index: Tensor) -> Tensor:
        """Positions in the flattened tensor. They are cached for an index that never changes."""
        if not never_changes(index):
            return self._positions(index)
        if self._last is None or self._last[0] is not index:
            self._last = (index, self._positions(index))
        return self._last[1]

    def _positions(self, index: Tensor) -> Tensor:
        modes, shape = index.unbind(1), self.tensor.shape
        if index.is_cpu and (outside := first_outside(modes, shape)):
            raise IndexError(outside)  # else another cell would be read
        cells = modes[0]
        for mode, size in zip(modes[1:], shape[1:], strict=True):
            cells = torch.add(mode, cells, alpha=size)
        return cells


def _check_memory(shape: Sequence[int], rank: Rank, num_parameters: int) -> None:
    """Refuse a model whose training needs more memory than there is."""
    needed, free = _TRAINED_BYTES * num_parameters, free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"expected a model to fit into memory, {in_gigabytes(free)} of it free, in `rank`, got {rank} for "
            f"{' × '.join(map(str, shape))}: {num_parameters} parameters, {in_gigabytes(needed)} with gradients and an "
            "optimizer's state; number the indices of each mode without gaps, or lower `rank`"
        )
