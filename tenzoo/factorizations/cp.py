"""The canonical polyadic format: a sum of R outer products."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from tenzoo.factorizations.als import QUICK_SWEEPS, cp_fit_size, fit_cp
from tenzoo.factorizations.base import Factorization
from tenzoo.factorizations.chain import split_at
from tenzoo.factorizations.decomposition import scaled_to_safety, svd_size, truncated_svd, wide_modes
from tenzoo.factorizations.errors import Errors, errors_of_matrix
from tenzoo.factorizations.gather import gather_rows
from tenzoo.factorizations.network import Leg

_BEGUN = 10
"""Sweeps from each start, before the better one is chosen."""


@final
class CP(Factorization):
    """Canonical polyadic format, ``T[i_1, …, i_d] = Σ_r U_1[i_1, r] ⋯ U_d[i_d, r]``.

    The cores are the d factors ``U_k (n_k, R)``; ``rank`` is ``(R,)``. Source: Hitchcock 1927; Kolda and Bader 2009,
    SIAM Review 51(3), section 3.

    A decomposition is found by alternating least squares. This is a local method, and from the singular vectors of a
    regular tensor it may never leave a saddle point, so it is begun from noise as well and goes on from the better
    result. At rank ∏ n_k / max n_k and above the decomposition is written down exactly; a matrix, also one with modes
    of size 1 and two others, is decomposed by its singular values.

    Example:
        >>> weight = CP((4, 5, 6), rank=2)
        >>> dense = torch.einsum("ir,jr,kr->ijk", *weight.cores)
        >>> torch.allclose(weight.reconstruct(), dense, atol=1e-5)
        True
    """

    name: ClassVar[str] = "cp"
    _split: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shape = self.shape
        self._split = min(range(1, len(shape)), key=lambda s: math.prod(shape[:s]) + math.prod(shape[s:]))

    @staticmethod
    def legs(order: int) -> list[tuple[Leg, ...]]:
        """A factor per mode, and one bond of all of them."""
        return [(mode, "r") for mode in range(order)]

    @classmethod
    def admitted_rank(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """The rank as it is given."""
        return rank

    @classmethod
    def usable_rank(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """The rank, clipped to ∏ n_k / max n_k, with which every tensor of the shape can be written down."""
        return (min(rank[0], math.prod(shape) // max(shape)),)

    @classmethod
    def fit(cls, tensor: Tensor, rank: tuple[int, ...]) -> Sequence[Tensor]:
        """Factors by alternating least squares, the better of two starts; of a matrix by singular values."""
        if tensor.numel() // max(tensor.shape) == rank[0]:
            return _exact_factors(tensor)
        if not tensor.any():
            return super().fit(tensor, rank)
        if len(wide := wide_modes(tensor.shape)) == 2:
            U, S, Vh = truncated_svd(tensor.squeeze(), rank[0])
            factors = [tensor.new_ones(size, rank[0]) for size in tensor.shape]
            factors[wide[0]], factors[wide[1]] = U * S, Vh.t()
            return factors
        scale = torch.linalg.vector_norm(tensor)
        unit = tensor / scale
        begun = [fit_cp(unit, start(unit, rank[0]), sweeps=_BEGUN) for start in (_singular_start, _noisy_start)]
        best, _ = fit_cp(unit, min(begun, key=lambda fit: fit[1])[0])
        return [best[0] * scale, *best[1:]]

    @classmethod
    def fit_size(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> int:
        """Estimate of the numbers that :meth:`fit` holds at its peak, the tensor itself not counted."""
        dense, factors = math.prod(shape), sum(shape) * rank[0]
        if dense // max(shape) == rank[0]:
            return dense + factors
        if len(wide := wide_modes(shape)) == 2:
            return svd_size(shape[wide[0]], shape[wide[1]], rank[0]) + factors
        starts = max(2 * dense + svd_size(size, dense // size, 0) for size in shape[1:])
        return max(starts, cp_fit_size(shape, rank[0])) + 5 * factors

    @classmethod
    def errors_by_rank(cls, tensor: Tensor) -> Errors:
        """Errors of short decompositions; of a matrix by its singular values."""
        if len(wide_modes(tensor.shape)) > 2 or not tensor.any():
            return super().errors_by_rank(tensor)
        return errors_of_matrix(scaled_to_safety(tensor)[0])

    @classmethod
    def quick_error(cls, tensor: Tensor, rank: tuple[int, ...]) -> float:
        """About the relative error of a decomposition, at a fraction of its time; the tensor has at least 3 modes."""
        unit = tensor / torch.linalg.vector_norm(tensor)
        return fit_cp(unit, _noisy_start(unit, rank[0]), sweeps=QUICK_SWEEPS)[1]

    def reconstruct(self) -> Tensor:
        """The dense tensor: Khatri–Rao products of the first and the last modes, then one matrix product."""
        factors = self.operands
        first, last = _khatri_rao(factors[: self._split]), _khatri_rao(factors[self._split :])
        return (first @ last.t()).view(self.shape)

    @property
    def multiplications(self) -> int:
        """Number of multiplications in :meth:`reconstruct`: those of the last product, and of the ones before."""
        sides = (self.shape[: self._split], self.shape[self._split :])
        products = sum(math.prod(side[: k + 1]) for side in sides for k in range(1, len(side)))
        return self.rank[0] * (math.prod(self.shape) + products)

    def merged(self, *counts: int) -> list[Tensor]:
        """The cores of the same tensor with neighboring modes merged to one.

        Args:
            *counts: How many modes each new mode takes.

        Example:
            >>> weight = CP((4, 5, 6), rank=2)
            >>> a, b = weight.merged(1, 2)
            >>> a.shape, b.shape, torch.allclose(a @ b.t(), weight.reconstruct().flatten(1), atol=1e-5)
            (torch.Size([4, 2]), torch.Size([30, 2]), True)
        """
        return [_khatri_rao(part) for part in split_at(self.operands, counts)]

    def entries_at(self, columns: Sequence[Tensor], *, sparse_grad: bool = False) -> Tensor:
        """Entries at one index column per mode, by products of rows."""
        product: Tensor | None = None
        for factor, column in zip(self.operands, columns, strict=True):
            rows = gather_rows(factor, column, sparse_grad=sparse_grad)
            product = rows if product is None else product * rows
        assert product is not None
        return product.sum(1)


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product ``(∏ n_k, R)``, the first mode the slowest."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product.unsqueeze(1) * factor).flatten(0, 1)
    return product


def _exact_factors(tensor: Tensor) -> list[Tensor]:
    """One component per fiber of the largest mode: unit vectors in the other modes."""
    shape = tensor.shape
    long = max(range(len(shape)), key=lambda k: shape[k])
    others = [k for k in range(len(shape)) if k != long]
    fibers = tensor.movedim(long, 0).reshape(shape[long], -1)
    positions = torch.arange(fibers.shape[1], device=tensor.device)
    factors = [fibers] * len(shape)
    for k, position in zip(others, torch.unravel_index(positions, [shape[k] for k in others]), strict=True):
        factors[k] = tensor.new_zeros(shape[k], fibers.shape[1]).index_put_((position, positions), tensor.new_ones(()))
    return factors


def _noisy_start(tensor: Tensor, rank: int) -> list[Tensor]:
    """Factors of seeded noise, with columns of about unit norm."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(size, rank, generator=generator, dtype=tensor.dtype) for size in tensor.shape]
    return [(factor / math.sqrt(len(factor))).to(tensor.device) for factor in noise]


def _singular_start(tensor: Tensor, rank: int) -> list[Tensor]:
    """Leading left singular vectors of the unfoldings, filled up with noise where there are too few.

    The first mode is updated before it is read, so noise will do there.
    """
    factors = _noisy_start(tensor, rank)
    for mode in range(1, tensor.ndim):
        unfolding = tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)
        basis = torch.linalg.svd(unfolding, full_matrices=False).U[:, :rank]
        factors[mode][:, : basis.shape[1]] = basis
    return factors
