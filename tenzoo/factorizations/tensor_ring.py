"""The tensor-ring format: a closed chain of cores."""

import math
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from tensorly.decomposition import tensor_ring, tensor_train
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tenzoo.factorizations.als import QUICK_SWEEPS, fit_ring, ring_fit_size
from tenzoo.factorizations.chain import Chain, usable_chain_rank
from tenzoo.factorizations.decomposition import chain_svd_size, tensorly_on_torch, truncated_svd, wide_modes
from tenzoo.factorizations.errors import Errors
from tenzoo.factorizations.network import Leg
from tenzoo.factorizations.tensor_train import TensorTrain

_NOISE = 0.3
"""Of the start of the least squares, relative to the entries of the cores."""


@final
class TensorRing(Chain):
    """Tensor-ring format, ``T[i_1, …, i_d] = tr(G_1[:, i_1, :] G_2[:, i_2, :] ⋯ G_d[:, i_d, :])``.

    The cores are ``G_k (r_{k-1}, n_k, r_k)`` with ``r_d = r_0``; ``rank`` holds the d ranks ``(r_0, …, r_{d-1})``.
    Source: Zhao et al. 2016, arXiv:1606.05535, eq. 1 and algorithm 1.

    A decomposition is computed by alternating least squares, which start from successive singular value decompositions.
    The first of these serves two ranks, ``r_0 r_1 ≤ min(n_1, n_2 ⋯ n_d)``, which starves most rings; the least squares
    give them their full ranks. With ``r_0 = 1``, or where the other ranks are full, which is lossless, it is that of a
    tensor train, and of a matrix a single one. Least squares may end in a local minimum: a tensor that is a ring of the
    given ranks is not always found again.

    Example:
        >>> import torch
        >>> weight = TensorRing((4, 5, 6), rank=[2, 3, 4])
        >>> dense = torch.einsum("aib,bjc,cka->ijk", *weight.cores)
        >>> torch.allclose(weight.reconstruct(), dense, atol=1e-5)
        True
    """

    name: ClassVar[str] = "tr"

    @staticmethod
    def legs(order: int) -> list[tuple[Leg, ...]]:
        """A chain whose last bond is its first."""
        return [(str(mode), mode, str((mode + 1) % order)) for mode in range(order)]

    @classmethod
    def usable_rank(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks, clipped to what a decomposition of this shape can use; an open ring where a train is as good."""
        if len(shape) == 2:
            return _usable_pair(min(shape), rank)
        full = usable_chain_rank(shape, (math.prod(shape),) * (len(shape) - 1))
        if rank[0] == 1 or all(given >= needed for given, needed in zip(rank[1:], full, strict=True)):
            return (1, *usable_chain_rank(shape, rank[1:]))
        return super().usable_rank(shape, rank)

    @classmethod
    def fit(cls, tensor: Tensor, rank: tuple[int, ...]) -> Sequence[Tensor]:
        """Cores by alternating least squares; of a matrix and with r_0 = 1 by singular value decompositions."""
        if tensor.ndim == 2:  # one singular value decomposition, its rank read as a pair; TensorLy would warn
            product = rank[0] * rank[1]
            served = min(product, *tensor.shape)
            left, right = tensor_train(tensor, rank=[1, served, 1], svd=truncated_svd).factors
            left, right = F.pad(left[0], (0, product - served)), F.pad(right[..., 0], (0, 0, 0, product - served))
            return [
                left.reshape(-1, *rank).transpose(0, 1),
                right.reshape(*rank, -1).permute(1, 2, 0),
            ]
        if rank[0] == 1:
            return [*tensor_train(tensor, rank=[*rank, 1], svd=truncated_svd).factors]
        if not tensor.any():
            return super().fit(tensor, rank)
        return fit_ring(tensor, _start(tensor, rank))[0]

    @classmethod
    def fit_size(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> int:
        """Estimate of the numbers that :meth:`fit` holds at its peak, the tensor itself not counted."""
        ranks = (*rank, rank[0])
        size = chain_svd_size(shape, ranks)
        return size if rank[0] == 1 or len(shape) == 2 else max(size, ring_fit_size(shape, ranks))

    @classmethod
    def errors_by_rank(cls, tensor: Tensor) -> Errors:
        """Errors of open rings, which are trains, by singular values, and of closed ones by short decompositions."""
        shape = tuple(tensor.shape)
        if not tensor.any():
            return super().errors_by_rank(tensor)
        open_rings = {(1, *rank): error for rank, error in TensorTrain.errors_by_rank(tensor).items()}
        if len(wide_modes(shape)) <= 2:
            return open_rings
        found = {**super().errors_by_rank(tensor), **open_rings}
        network = cls.network(len(shape))
        return dict(sorted(found.items(), key=lambda item: network.num_parameters(shape, item[0])))

    @classmethod
    def quick_error(cls, tensor: Tensor, rank: tuple[int, ...]) -> float:
        """About the relative error of a decomposition, at a fraction of its time; 1 of an open ring."""
        if rank[0] == 1:
            return 1.0
        with tensorly_on_torch():
            return fit_ring(tensor, _start(tensor, rank), sweeps=QUICK_SWEEPS)[1]


def _usable_pair(shared: int, rank: Sequence[int]) -> tuple[int, int]:
    """The ranks of a matrix of rank ``shared``: as they are, or the least product of smaller ones that is enough."""
    first, second = rank
    if first * second <= shared:
        return first, second
    pairs = [(k, -(-shared // k)) for k in range(1, min(first, shared) + 1)]
    return min((pair for pair in pairs if pair[1] <= second), key=math.prod)


def _start(tensor: Tensor, rank: tuple[int, ...]) -> list[Tensor]:
    """Cores for the least squares to start from."""
    shape = tuple(tensor.shape)
    served = _shared(shape, rank)
    plain = tensor_ring(tensor, rank=[*served, served[0]], svd=truncated_svd).factors
    shapes = TensorRing.network(len(shape)).core_shapes(shape, rank)
    return [_enlarged(core, wanted, seed) for seed, (core, wanted) in enumerate(zip(plain, shapes, strict=True))]


def _shared(shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
    """The ranks, clipped to what successive singular value decompositions can serve."""
    bound = min(shape[0], math.prod(shape[1:]))
    second = min(rank[1], bound)
    first = min(rank[0], bound // second)
    return (first, second, *usable_chain_rank(shape[1:], rank[2:], left=second, right=first))


def _enlarged(core: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """A core in the corner of a larger one that holds some noise, so that no part of it starts at a saddle point."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(core.device)
    larger = _NOISE * core.double().square().mean().sqrt() * noise
    larger[: core.shape[0], :, : core.shape[2]] += core
    return larger
