"""The cores of a tensor that are as small as they can be.

Where two cores share a rank, one may be multiplied by an invertible matrix M and the other by its inverse. Of all cores
of the same tensor those with the least ``Σ_k ‖G_k‖²`` have equal Gram matrices on both sides of every rank, so that all
of them have the same norm: their Norm Deviation is 0. Decompositions leave all scale in one core, or, where they fit a
ring, directions that nearly cancel; from cores that are balanced, gradient descent has an even start.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tenzoo.factorizations.network import Holder, Network

_SWEEPS = 50
_CONVERGED = 1e-6
"""Relative change of the sum of squared norms in a sweep."""

_FLOOR = 1e-10
"""Share of its trace that is added to a Gram matrix: directions that a core does not have are left alone."""


def balanced(cores: Sequence[Tensor], network: Network) -> list[Tensor]:
    """Balance the cores of a network.

    Args:
        cores: One for each core of the network.
        network: Its bonds and hyperedges.

    Returns:
        Cores of the same shapes and the same tensor, in float64.

    Example:
        >>> network = Network([(0, "r"), ("r", 1)], 2, lambda rank, order: {"r": rank[0]})
        >>> a, b = 10 * torch.eye(2), torch.tensor([[0.1, 0.0], [0.0, 0.4]])
        >>> a, b = balanced([a, b], network)
        >>> (a @ b).round(decimals=6).tolist(), round(float(a.norm() - b.norm()), 6)
        ([[1.0, 0.0], [0.0, 4.0]], 0.0)
    """
    cores = [core.double() for core in cores]
    if not all(bool(core.any()) for core in cores):
        return cores  # of a tensor that is zero
    bonds = [network.holders[bond] for bond in network.pairs]
    hyperedges = [network.holders[bond] for bond in network.hyperedges]
    size = _squared(cores)
    for _ in range(_SWEEPS):
        before = size
        for first, second in bonds:
            _balance_bond(cores, first, second)
        for holders in hyperedges:
            slices = [cores[core].movedim(dim, 0) for core, dim in holders]
            for (core, dim), part in zip(holders, balanced_slices(slices), strict=True):
                cores[core] = part.movedim(0, dim)
        size = _squared(cores)
        if before - size <= _CONVERGED * size or len(bonds) + len(hyperedges) == 1:
            break
    return [core.contiguous() for core in cores]


def balanced_slices(cores: Sequence[Tensor]) -> list[Tensor]:
    """Balance cores ``(R, …)`` that share a hyperedge, their first dimension: slices at one index get the same norm.

    Example:
        >>> [core.tolist() for core in balanced_slices([torch.tensor([[9.0]]), torch.tensor([[4.0]])])]
        [[[6.0]], [[6.0]]]
    """
    norms = torch.stack([torch.linalg.vector_norm(core.reshape(len(core), -1), dim=1) for core in cores])
    mean = norms.log().mean(0).exp()
    factors = torch.where(mean > 0, mean / norms.clamp(min=torch.finfo(norms.dtype).tiny), 1.0)
    return [core * factor.view(-1, *(1 for _ in core.shape[1:])) for core, factor in zip(cores, factors, strict=True)]


def _balance_bond(cores: list[Tensor], first: Holder, second: Holder) -> None:
    a, b = (cores[core].movedim(dim, 0) for core, dim in (first, second))
    matrix = _between(_gram(a), _gram(b))
    cores[first.core] = torch.tensordot(matrix.t(), a, dims=1).movedim(0, first.dim)
    cores[second.core] = torch.linalg.solve(matrix, b.reshape(len(b), -1)).reshape(b.shape).movedim(0, second.dim)


def _squared(cores: Sequence[Tensor]) -> float:
    return sum(float(core.square().sum()) for core in cores)


def _gram(core: Tensor) -> Tensor:
    matrix = core.reshape(len(core), -1)
    gram = matrix @ matrix.t()
    return gram + _FLOOR * gram.trace() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _between(first: Tensor, second: Tensor) -> Tensor:
    """M with ``Mᵀ P M = M⁻¹ R M⁻ᵀ``: a root of the geometric mean ``M Mᵀ`` of ``P⁻¹`` and R."""
    values, vectors = torch.linalg.eigh(first)
    root, inverse = (vectors * values.sqrt()) @ vectors.t(), (vectors / values.sqrt()) @ vectors.t()
    inner, turned = torch.linalg.eigh(root @ second @ root)
    inner = inner.clamp(min=_FLOOR**2 * float(inner[-1]))
    between: Tensor = inverse @ (turned * inner.sqrt().sqrt())
    return between  # M Mᵀ = P^-½ (P^½ R P^½)^½ P^-½
