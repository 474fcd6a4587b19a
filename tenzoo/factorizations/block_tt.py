"""The tensor train of a matrix, whose cores carry a row and a column mode each."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

from tensorly.decomposition import tensor_train_matrix
from torch import Tensor

from tenzoo.factorizations.base import Factorization
from tenzoo.factorizations.chain import (
    best_split,
    chain_entries,
    chain_multiplications,
    reconstruct_chain,
    usable_chain_rank,
)
from tenzoo.factorizations.decomposition import chain_svd_size, truncated_svd
from tenzoo.factorizations.gather import gather_slices
from tenzoo.factorizations.network import Leg, OrderError


@final
class BlockTT(Factorization):
    """Tensor train of a matrix, ``T[i_1, …, i_d, j_1, …, j_d] = G_1[:, i_1, j_1, :] ⋯ G_d[:, i_d, j_d, :]``.

    ``shape`` is ``(m_1, …, m_d, n_1, …, n_d)``: reshaped to ``(m_1 ⋯ m_d, n_1 ⋯ n_d)``, the tensor is a matrix. The
    cores are ``G_k (r_{k-1}, m_k, n_k, r_k)`` with ``r_0 = r_d = 1``; ``rank`` holds the d - 1 interior ranks.
    Source: Novikov et al. 2015, arXiv:1509.06569, eq. 3; Oseledets 2010, SIAM J. Matrix Anal. Appl. 31(4).

    A decomposition is the tensor train over the d pairs ``m_k n_k``, by successive singular value decompositions.

    Example:
        >>> import torch
        >>> weight = BlockTT((2, 3, 4, 5), rank=2)
        >>> dense = torch.einsum("aijb,bklc->ikjl", *weight.cores)
        >>> torch.allclose(weight.reconstruct(), dense, atol=1e-5)
        True
    """

    name: ClassVar[str] = "btt"
    _split: int
    _paired_shape: tuple[int, ...]
    _unpaired: tuple[int, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        pairs = _pairs(self.shape)
        self._split = best_split([m * n for m, n in pairs], (1, *self.rank, 1))
        self._paired_shape = tuple(size for pair in pairs for size in pair)
        self._unpaired = (*range(0, len(self.shape), 2), *range(1, len(self.shape), 2))

    @staticmethod
    def legs(order: int) -> list[tuple[Leg, ...]]:
        """A chain of cores with two modes each, k and k + d; the bonds at its ends have one core each."""
        if order % 2:
            raise OrderError(
                "expected an even number of sizes (m_1, ..., m_d, n_1, ..., n_d) in `shape`, got "
                f"{order}; append a size 1 to the shorter side"
            )
        half = order // 2
        return [(str(mode), mode, mode + half, str(mode + 1)) for mode in range(half)]

    @classmethod
    def bond_sizes(cls, rank: tuple[int, ...], order: int) -> dict[str, int]:
        """The ranks between ends of size 1."""
        return dict(zip(map(str, range(order // 2 + 1)), (1, *rank, 1), strict=True))

    @classmethod
    def admitted_rank(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks as they are given."""
        return rank

    @classmethod
    def usable_rank(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks, clipped from the left to what successive singular value decompositions can use."""
        return usable_chain_rank([m * n for m, n in _pairs(shape)], rank)

    @classmethod
    def fit(cls, tensor: Tensor, rank: tuple[int, ...]) -> Sequence[Tensor]:
        """Cores by TensorLy's successive singular value decompositions."""
        return list(tensor_train_matrix(tensor, rank=[1, *rank, 1], svd=truncated_svd).factors)

    @classmethod
    def fit_size(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> int:
        """Estimate of the numbers that :meth:`fit` holds at its peak, the tensor itself not counted."""
        return math.prod(shape) + chain_svd_size([m * n for m, n in _pairs(shape)], (1, *rank, 1))

    def reconstruct(self) -> Tensor:
        """The dense tensor, contracted as a tensor train over pairs of modes; a view, its modes permuted."""
        return reconstruct_chain(self.operands, self._split).view(self._paired_shape).permute(self._unpaired)

    @property
    def multiplications(self) -> int:
        """Number of multiplications in :meth:`reconstruct`."""
        return chain_multiplications([m * n for m, n in _pairs(self.shape)], (1, *self.rank, 1), self._split)

    def entries_at(self, columns: Sequence[Tensor], *, sparse_grad: bool = False) -> Tensor:
        """Entries at one index column per mode, by products of matrices."""
        half = len(columns) // 2
        pairs = zip(self.operands, columns[:half], columns[half:], strict=True)
        return chain_entries([gather_slices(core, pair, sparse_grad=sparse_grad) for core, *pair in pairs])


def _pairs(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    half = len(shape) // 2
    return list(zip(shape[:half], shape[half:], strict=True))
