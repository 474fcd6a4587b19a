"""The tensor-ring format: a closed chain of cores."""

import math
from collections.abc import Sequence
from typing import ClassVar, final

from tensorly.decomposition import tensor_ring, tensor_train
from torch import Tensor

from tenzoo.factorizations.chain import Chain, usable_chain_rank


@final
class TensorRing(Chain):
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

    @staticmethod
    def _num_ranks(order: int) -> int:
        return order

    @staticmethod
    def _usable_rank(shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        shared = min(shape[0], math.prod(shape[1:]))
        second = min(rank[1], shared)
        first = min(rank[0], shared // second)
        return (first, second, *usable_chain_rank(shape[1:], rank[2:], left=second, right=first))

    @staticmethod
    def _all_ranks(rank: tuple[int, ...]) -> tuple[int, ...]:
        return (*rank, rank[0])

    @staticmethod
    def _decompose(tensor: Tensor, rank: tuple[int, ...]) -> Sequence[Tensor]:
        if tensor.ndim == 2:  # one singular value decomposition, its rank read as a pair; TensorLy would warn
            left, right = tensor_train(tensor, rank=[1, rank[0] * rank[1], 1]).factors
            return [
                left.reshape(-1, *rank).transpose(0, 1),
                right.reshape(*rank, -1).permute(1, 2, 0),
            ]
        return list(tensor_ring(tensor, rank=[*rank, rank[0]]).factors)
