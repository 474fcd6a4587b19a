"""The tensor-train format: an open chain of cores."""

import math
from collections.abc import Sequence
from typing import ClassVar, final

from tensorly.decomposition import tensor_train
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
class TensorTrain(Factorization):
    """Tensor-train format, ``T[i_1, …, i_d] = G_1[:, i_1, :] G_2[:, i_2, :] ⋯ G_d[:, i_d, :]``.

    The cores are ``G_k (r_{k-1}, n_k, r_k)`` with ``r_0 = r_d = 1``; ``rank`` holds the d - 1 interior ranks
    ``(r_1, …, r_{d-1})``. Source: Oseledets 2011, SIAM J. Sci. Comput. 33(5), eq. 1.2 and algorithm 1.

    A decomposition is computed by successive singular value decompositions. Its squared error is at most d - 1 times
    that of the best approximation of the same ranks.

    Example:
        >>> import torch
        >>> weight = TensorTrain((4, 5, 6), rank=[2, 3])
        >>> dense = torch.einsum("aib,bjc,ckd->ijk", *weight.cores)
        >>> torch.allclose(weight.reconstruct(), dense, atol=1e-5)
        True
    """

    name: ClassVar[str] = "tt"
    _split: int

    def reconstruct(self) -> Tensor:
        """The dense tensor: the chain is contracted from both of its ends, and the halves are multiplied."""
        return rebuild_chain(list(self.cores), self._split).view(self.shape)

    @property
    def multiplications(self) -> int:
        """Number of multiplications in :meth:`reconstruct`."""
        return chain_multiplications(self.shape, (1, *self.rank, 1), self._split)

    def merged(self, *counts: int) -> list[Tensor]:
        """The cores of the same tensor with neighboring modes merged to one.

        Args:
            *counts: How many modes each new mode takes.

        Example:
            >>> [tuple(core.shape) for core in TensorTrain((4, 5, 6), rank=[2, 3]).merged(2, 1)]
            [(1, 20, 3), (3, 6, 1)]
        """
        return merge_chain(list(self.cores), counts)

    def _entries(self, columns: Sequence[Tensor], *, sparse_grad: bool) -> Tensor:
        pairs = zip(self.cores, columns, strict=True)
        return chain_entries([gather_slices(core, [column], sparse_grad=sparse_grad) for core, column in pairs])

    def _plan(self) -> None:
        self._split = best_split(self.shape, (1, *self.rank, 1))

    @staticmethod
    def _num_ranks(order: int) -> int:
        return order - 1

    @staticmethod
    def _admitted_rank(shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        return rank

    @staticmethod
    def _usable_rank(shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        return usable_chain_rank(shape, rank)

    @staticmethod
    def _core_shapes(shape: tuple[int, ...], rank: tuple[int, ...]) -> list[tuple[int, ...]]:
        return list(zip((1, *rank), shape, (*rank, 1), strict=True))

    @staticmethod
    def _num_monomials(rank: tuple[int, ...]) -> int:
        return math.prod(rank)

    @staticmethod
    def _decompose(tensor: Tensor, rank: tuple[int, ...]) -> Sequence[Tensor]:
        return list(tensor_train(tensor, rank=[1, *rank, 1]).factors)

    @staticmethod
    def _decomposition_size(shape: tuple[int, ...], rank: tuple[int, ...]) -> int:
        return chain_svd_size(shape, (1, *rank, 1))
