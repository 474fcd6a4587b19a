"""The Tucker format: a small core tensor, multiplied by a factor in every mode."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

from tensorly.decomposition import tucker
from torch import Tensor

from tenzoo.factorizations.base import Factorization
from tenzoo.factorizations.chain import multiply_batch, split_at
from tenzoo.factorizations.decomposition import svd_size, truncated_svd
from tenzoo.factorizations.gather import gather_rows, whole_with_sparse_grad
from tenzoo.factorizations.network import Leg


@final
class Tucker(Factorization):
    """Tucker format, ``T = G ×_1 U_1 ×_2 ⋯ ×_d U_d``.

    The cores are the core tensor ``G (r_1, …, r_d)``, first, and the d factors ``U_k (n_k, r_k)``. A rank above
    ``min(n_k, ∏_{j≠k} n_j)``, the largest that the k-th unfolding of a tensor can have, is clipped to it.
    Source: Tucker 1966, Psychometrika 31(3); Kolda and Bader 2009, SIAM Review 51(3), section 4.

    A decomposition is found by higher-order orthogonal iteration, started from the singular vectors of the unfoldings.

    Example:
        >>> import torch
        >>> weight = Tucker((4, 5, 6), rank=[2, 3, 4])
        >>> dense = torch.einsum("abc,ia,jb,kc->ijk", *weight.cores)
        >>> torch.allclose(weight.reconstruct(), dense, atol=1e-5)
        True
    """

    name: ClassVar[str] = "tucker"
    _mode_order: tuple[int, ...]
    _widest: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        modes = range(len(self.shape))
        self._mode_order = tuple(sorted(modes, key=lambda k: self.shape[k] / self.rank[k]))
        self._widest = max(modes, key=lambda k: self.rank[k])

    @staticmethod
    def legs(order: int) -> list[tuple[Leg, ...]]:
        """The core tensor, and a factor per mode."""
        return [tuple(map(str, range(order))), *((mode, str(mode)) for mode in range(order))]

    @classmethod
    def fit(cls, tensor: Tensor, rank: tuple[int, ...]) -> Sequence[Tensor]:
        """The core tensor and the factors by TensorLy's higher-order orthogonal iteration."""
        if not tensor.any():  # the relative error that the iteration watches would be 0 / 0
            return super().fit(tensor, rank)
        core, factors = tucker(tensor, rank=list(rank), init="svd", svd=truncated_svd, tol=_CONVERGED, random_state=0)
        return [core, *factors]

    @classmethod
    def fit_size(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> int:
        """Estimate of the numbers that :meth:`fit` holds at its peak, the tensor itself not counted."""
        dense = math.prod(shape)
        starts = max(dense + svd_size(size, dense // size, r) for size, r in zip(shape, rank, strict=True))
        return starts + sum(size * r for size, r in zip(shape, rank, strict=True))

    def reconstruct(self) -> Tensor:
        """The dense tensor: one product per mode, those that enlarge the tensor least first."""
        tensor: Tensor
        tensor, *factors = self.operands
        sizes = list(self.rank)
        for k in self._mode_order:
            tensor = _mode_product(tensor, factors[k], math.prod(sizes[:k]), math.prod(sizes[k + 1 :]))
            sizes[k] = self.shape[k]
        return tensor.view(self.shape)

    @property
    def multiplications(self) -> int:
        """Number of multiplications in :meth:`reconstruct`."""
        total, sizes = 0, list(self.rank)
        for k in self._mode_order:
            total += math.prod(sizes) * self.shape[k]
            sizes[k] = self.shape[k]
        return total

    def merged(self, *counts: int) -> list[Tensor]:
        """The cores of the same tensor with neighboring modes merged to one: factors become Kronecker products.

        Args:
            *counts: How many modes each new mode takes.

        Example:
            >>> import torch
            >>> weight = Tucker((4, 5, 6), rank=[2, 3, 4])
            >>> core, u, v = weight.merged(1, 2)
            >>> core.shape, v.shape, torch.allclose(u @ core @ v.t(), weight.reconstruct().flatten(1), atol=1e-5)
            (torch.Size([2, 12]), torch.Size([30, 12]), True)
        """
        core: Tensor
        core, *factors = self.operands
        parts = split_at(factors, counts)
        merged = [_kronecker(part) for part in parts]
        return [core.reshape([factor.shape[1] for factor in merged]), *merged]

    def entries_at(self, columns: Sequence[Tensor], *, sparse_grad: bool = False) -> Tensor:
        """Entries at one index column per mode: the core tensor is multiplied by one row per mode."""
        core: Tensor
        core, *factors = self.operands
        rows = [
            gather_rows(factor, column, sparse_grad=sparse_grad)
            for factor, column in zip(factors, columns, strict=True)
        ]
        if sparse_grad:
            core = whole_with_sparse_grad(core)
        # The mode of the largest rank goes first: what is held per entry is the core tensor without that mode.
        first = rows.pop(self._widest)
        values = (first @ core.movedim(self._widest, 0).reshape(first.shape[1], -1)).unsqueeze(1)
        for row in rows:
            rank = row.shape[1]
            values = multiply_batch(row.unsqueeze(1), values.view(len(row), rank, values.shape[2] // rank))
        return values.flatten()


def _kronecker(factors: Sequence[Tensor]) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        pairs = product[:, None, :, None] * factor[None, :, None, :]
        product = pairs.reshape(len(product) * len(factor), -1)
    return product


_CONVERGED = 1e-5
"""Change of the relative error in a sweep of the higher-order orthogonal iteration, which starts near its end."""

_SMALL_BATCH = 2**12
"""Elements of a factor, repeated for each block, up to which a batched product is faster than transposing."""


def _mode_product(tensor: Tensor, factor: Tensor, before: int, after: int) -> Tensor:
    """Multiply the middle mode of a contiguous tensor, seen as ``(before, r, after)``, by ``factor (n, r)``."""
    size, rank = factor.shape
    if after == 1:
        return tensor.reshape(before, rank) @ factor.t()
    if before == 1:
        return factor @ tensor.reshape(rank, after)
    if before * factor.numel() <= _SMALL_BATCH:
        return multiply_batch(factor.expand(before, size, rank), tensor.reshape(before, rank, after))
    # One product of matrices between two transpositions: the batched product's gradient for the factor has a copy for
    # each of the ``before`` blocks, and blocks of few columns multiply slowly.
    rows = tensor.reshape(before, rank, after).transpose(1, 2).reshape(before * after, rank)
    return (rows @ factor.t()).view(before, after, size).transpose(1, 2).contiguous()
