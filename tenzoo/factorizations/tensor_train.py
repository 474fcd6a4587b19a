"""The tensor-train format: an open chain of cores."""

from collections.abc import Sequence
from typing import ClassVar, final

from tensorly.decomposition import tensor_train
from torch import Tensor

from tenzoo.factorizations.chain import Chain, usable_chain_rank
from tenzoo.factorizations.decomposition import chain_svd_size, truncated_svd
from tenzoo.factorizations.network import Leg


@final
class TensorTrain(Chain):
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

    @staticmethod
    def legs(order: int) -> list[tuple[Leg, ...]]:
        """A chain; the bonds at its ends have one core each."""
        return [(str(mode), mode, str(mode + 1)) for mode in range(order)]

    @classmethod
    def bond_sizes(cls, rank: tuple[int, ...], order: int) -> dict[str, int]:
        """The ranks between ends of size 1."""
        return dict(zip(map(str, range(order + 1)), (1, *rank, 1), strict=True))

    @classmethod
    def usable_rank(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks, clipped from the left to what successive singular value decompositions can use."""
        return usable_chain_rank(shape, rank)

    @classmethod
    def fit(cls, tensor: Tensor, rank: tuple[int, ...]) -> Sequence[Tensor]:
        """Cores by TensorLy's successive singular value decompositions."""
        return list(tensor_train(tensor, rank=[1, *rank, 1], svd=truncated_svd).factors)

    @classmethod
    def fit_size(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> int:
        """Estimate of the numbers that :meth:`fit` holds at its peak, the tensor itself not counted."""
        return chain_svd_size(shape, (1, *rank, 1))
