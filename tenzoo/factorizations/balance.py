"""The cores of a tensor that are as small as they can be.

Where two cores share a rank, one may be multiplied by an invertible matrix M and the other by its inverse. Of all cores
of the same tensor those with the least ``Σ_k ‖G_k‖²`` have equal Gram matrices on both sides of every rank, so that all
of them have the same norm: their Norm Deviation is 0. Decompositions leave all scale in one core, or, where they fit a
ring, directions that nearly cancel; from cores that are balanced, gradient descent has an even start.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_SWEEPS = 50
_CONVERGED = 1e-6
"""Relative change of the sum of squared norms in a sweep."""

_FLOOR = 1e-10
"""Share of its trace that is added to a Gram matrix: directions that a core does not have are left alone."""


class Bond(NamedTuple):
    """A rank that two cores share: which cores, and which of their dimensions it is."""

    first: int
    first_dim: int
    second: int
    second_dim: int


def balance_bonds(cores: Sequence[Tensor], bonds: Sequence[Bond]) -> list[Tensor]:
    """Balance cores that share ranks in pairs.

    Args:
        cores: Of any shapes.
        bonds: Their ranks.

    Returns:
        Cores of the same shapes and the same tensor, in float64.

    Example:
        >>> a, b = 10 * torch.eye(2), torch.tensor([[0.1, 0.0], [0.0, 0.4]])
        >>> a, b = balance_bonds([a, b], [Bond(0, 1, 1, 0)])
        >>> (a @ b).round(decimals=6).tolist(), round(float(a.norm() - b.norm()), 6)
        ([[1.0, 0.0], [0.0, 4.0]], 0.0)
    """
    cores = [core.double() for core in cores]
    size = sum(float(core.square().sum()) for core in cores)
    if not all(bool(core.any()) for core in cores):
        return cores  # of a tensor that is zero
    for _ in range(_SWEEPS):
        before = size
        for first, first_dim, second, second_dim in bonds:
            a, b = cores[first].movedim(first_dim, 0), cores[second].movedim(second_dim, 0)
            matrix = _between(_gram(a), _gram(b))
            cores[first] = torch.tensordot(matrix.t(), a, dims=1).movedim(0, first_dim)
            solved = torch.linalg.solve(matrix, b.flatten(1)).reshape(b.shape)
            cores[second] = solved.movedim(0, second_dim)
        size = sum(float(core.square().sum()) for core in cores)
        if before - size <= _CONVERGED * size or len(bonds) == 1:
            break
    return [core.contiguous() for core in cores]


def balance_columns(factors: Sequence[Tensor]) -> list[Tensor]:
    """Balance the factors of CP ``(n_k, R)``: the columns of a component get the same norm.

    Example:
        >>> [factor.tolist() for factor in balance_columns([torch.tensor([[9.0]]), torch.tensor([[4.0]])])]
        [[[6.0]], [[6.0]]]
    """
    factors = [factor.double() for factor in factors]
    norms = torch.stack([torch.linalg.vector_norm(factor, dim=0) for factor in factors])
    mean = norms.log().mean(0).exp()
    return [
        torch.where(mean > 0, factor * (mean / norm), factor)
        for factor, norm in zip(factors, norms.clamp(min=torch.finfo(norms.dtype).tiny), strict=True)
    ]


def _gram(core: Tensor) -> Tensor:
    matrix = core.flatten(1)
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
