"""The tensor-ring format: a closed chain of cores."""

import math
from collections.abc import Sequence
from typing import ClassVar, final

from tensorly.decomposition import tensor_ring, tensor_train
from torch import Tensor

from tenzoo.factorizations.base import Factorization
from tenzoo.factorizations.chain import (
    best_split,
    chain_entries,
    chain_multiplications,
    merge_chain,
    rebuild_chain,
    usable_chain_rank,
)
from tenzoo.factorizations.decomposition import chain_svd_size
from tenzoo.factorizations.gather import gather_slices


@final
class TensorRing(Factorization):
    """Tensor-ring format, ``T[i_1, …, i_d] = tr(G_1[:, i_1, :] G_2[:, i_2, :] ⋯ G_d[:, i_d, :])``.

    The cores are ``G_k (r_{k-1}, n_k, r_k)`` with ``r_d = r_0``; ``rank`` holds the d ranks ``(r_0, …, r_{d-1})``.
    Source: Zhao et al. 2016, arXiv:1606.05535, eq. 1 and algorithm 1.

    A decomposition is computed by successive singular value decompositions, the first of which has to be shared by two
    ranks, ``r_0 r_1 ≤ min(n_1, n_2 ⋯ n_d)``. r_1 is served first, for then a full rank is lossless: it is the
    tensor train, with ``r_0 = 1``.

    Example:
        >>> import torch
        >>> weight = TensorRing((4, 5, 6), rank=[2, 3, 4])
        >>> dense = torch.einsum("aib,bjc,cka->ijk", *weight.cores)
        >>> torch.allclose(weight.reconstruct(), dense, atol=1e-5)
        True
    """

    name: ClassVar[str] = "tr"
    _split: int

    def reconstruct(self) -> Tensor:
        """The dense tensor: two arcs of the ring are contracted, and multiplied over both ranks that join them."""
        return rebuild_chain(list(self.cores), self._split).view(self.shape)

    @property
    def multiplications(self) -> int:
        """Number of multiplications in :meth:`reconstruct`."""
        return chain_multiplications(self.shape, (*self.rank, self.rank[0]), self._split)

    def merged(self, *counts: int) -> list[Tensor]:
        """The cores of the same tensor with neighboring modes merged to one.

        Args:
            *counts: How many modes each new mode takes.

        Example:
            >>> [tuple(core.shape) for core in TensorRing((4, 5, 6), rank=[2, 3, 4]).merged(2, 1)]
            [(2, 20, 4), (4, 6, 2)]
        """
        return merge_chain(list(self.cores), counts)

    def _entries(self, columns: Sequence[Tensor], *, sparse_grad: bool) -> Tensor:
        pairs = zip(self.cores, columns, strict=True)
        return chain_entries([gather_slices(core, [column], sparse_grad=sparse_grad) for core, column in pairs])

    def _plan(self) -> None:
        self._split = best_split(self.shape, (*self.rank, self.rank[0]))

    @staticmethod
    def _num_ranks(order: int) -> int:
        return order

    @staticmethod
    def _admitted_rank(shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        return rank

    @staticmethod
    def _usable_rank(shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        shared = min(shape[0], math.prod(shape[1:]))
        second = min(rank[1], shared)
        first = min(rank[0], shared // second)
        return (first, second, *usable_chain_rank(shape[1:], rank[2:], left=second, right=first))

    @staticmethod
    def _core_shapes(shape: tuple[int, ...], rank: tuple[int, ...]) -> list[tuple[int, ...]]:
        return list(zip(rank, shape, (*rank[1:], rank[0]), strict=True))

    @staticmethod
    def _num_monomials(rank: tuple[int, ...]) -> int:
        return math.prod(rank)

    @staticmethod
    def _decompose(tensor: Tensor, rank: tuple[int, ...]) -> Sequence[Tensor]:
        if tensor.ndim == 2:  # one singular value decomposition, its rank read as a pair; TensorLy would warn
            left, right = tensor_train(tensor, rank=[1, rank[0] * rank[1], 1]).factors
            return [
                left.reshape(-1, *rank).transpose(0, 1),
                right.reshape(*rank, -1).permute(1, 2, 0),
            ]
        return list(tensor_ring(tensor, rank=[*rank, rank[0]]).factors)

    @staticmethod
    def _decomposition_size(shape: tuple[int, ...], rank: tuple[int, ...]) -> int:
        return chain_svd_size(shape, (*rank, rank[0]))
