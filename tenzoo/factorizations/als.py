"""Fitting CP and tensor rings by alternating least squares.

With all cores but one fixed both are linear in that core, and the best one solves the normal equations
``X (Sᵀ S) = T_(k) S``, S being what the other cores make of it as a matrix (Kolda and Bader 2009, section 3.4; Zhao et
al. 2016, arXiv:1606.05535, section 3.2). S is never formed: ``Sᵀ S`` comes from one small matrix per core, and
``T_(k) S`` from contracting the tensor with one core after another, the longest mode first. So memory stays near that
of the tensor, where S itself may be many times as large. Everything is computed in float64.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SWEEPS = 100
_CONVERGED = 1e-5
"""Relative change of the error in a sweep."""

_RIDGE = 1e-9
"""Share of the mean diagonal of the normal equations that keeps them solvable."""


def fit_cp(tensor: Tensor, start: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """Improve the factors of a CP until they change little.

    Args:
        tensor: Shape ``(n_1, …, n_d)``, not all zero.
        start: Factors ``(n_k, R)``.

    Returns:
        The factors, and their relative error ``‖T − T̂‖ / ‖T‖``; in float64.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> start = [torch.randn(n, 2, generator=generator) for n in (4, 5, 6)]
        >>> tensor = torch.einsum("ir,jr,kr->ijk", *start)
        >>> noisy = [factor + 0.1 * torch.randn(factor.shape, generator=generator) for factor in start]
        >>> fit_cp(tensor, noisy)[1] < 1e-4
        True
    """
    tensor, factors = tensor.double(), [factor.double() for factor in start]
    grams = [factor.t() @ factor for factor in factors]
    square, error = float(tensor.square().sum()), math.inf
    for _ in range(_SWEEPS):
        before = error
        for k in range(tensor.ndim):
            gram = torch.stack([*grams[:k], *grams[k + 1 :]]).prod(0)
            target = _project(tensor, factors, k)
            factors[k] = _solved(gram, target)
            grams[k] = factors[k].t() @ factors[k]
        rest = square - 2 * float((target * factors[-1]).sum()) + float((gram * grams[-1]).sum())
        error = math.sqrt(max(rest, 0.0) / square)
        if not before - error > _CONVERGED * error:
            break
    return factors, error


def cp_fit_size(shape: Sequence[int], rank: int) -> int:
    """Numbers of 4 bytes held at the peak of :func:`fit_cp`, the tensor itself not counted.

    Args:
        shape: Sizes n_1, …, n_d.
        rank: R.

    Example:
        >>> cp_fit_size((64, 9, 64), 64) < 16 * 64 * 9 * 64
        True
    """
    dense, longest = math.prod(shape), sorted(shape)[-2:]  # of which one is the mode that is solved for
    return 2 * (3 * dense + dense // min(longest) * rank + (len(shape) + 5) * rank**2 + 3 * sum(shape) * rank)


def fit_ring(tensor: Tensor, start: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """Improve the cores of a ring until they change little.

    Args:
        tensor: Shape ``(n_1, …, n_d)``, d ≥ 3, not all zero.
        start: Cores ``(r_{k-1}, n_k, r_k)`` with ``r_d = r_0``.

    Returns:
        The cores, and their relative error ``‖T − T̂‖ / ‖T‖``; in float64.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> start = [torch.randn(2, n, 2, generator=generator) for n in (4, 5, 6)]
        >>> tensor = torch.einsum("aib,bjc,cka->ijk", *start)
        >>> noisy = [core + 0.1 * torch.randn(core.shape, generator=generator) for core in start]
        >>> fit_ring(tensor, noisy)[1] < 1e-4
        True
    """
    tensor, cores = tensor.double(), [core.double() for core in start]
    square, error = float(tensor.square().sum()), math.inf
    for _ in range(_SWEEPS):
        before = error
        for k in range(tensor.ndim):
            others = [*cores[k + 1 :], *cores[:k]]
            turned = tensor.permute(*range(k, tensor.ndim), *range(k))
            left, size, right = cores[k].shape
            gram = _gram(others)
            target = _contract(turned, others).reshape(size, left * right)
            found = _solved(gram, target)
            cores[k] = found.reshape(size, left, right).transpose(0, 1).contiguous()
        rest = square - 2 * float((target * found).sum()) + float(((found @ gram) * found).sum())
        error = math.sqrt(max(rest, 0.0) / square)
        if not before - error > _CONVERGED * error:
            break
    return cores, error


def ring_fit_size(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers of 4 bytes held at the peak of :func:`fit_ring`, the tensor itself not counted.

    Args:
        shape: Sizes n_1, …, n_d.
        ranks: Ranks r_0, …, r_d, with ``r_d = r_0``.

    Example:
        >>> ring_fit_size((64, 9, 64), (8, 8, 8, 8)) < 12 * 64 * 9 * 64
        True
    """
    dense, largest = math.prod(shape), max(shape)
    pairs = [left * right for left, right in itertools.pairwise(ranks)]
    return 2 * (2 * dense + 3 * (dense // largest) * max(pairs) + 5 * max(pairs) ** 2)


def _solved(gram: Tensor, target: Tensor) -> Tensor:
    damped = gram + _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(damped, target.t()).t()
    return solved


def _project(tensor: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """``T_(k)`` times the Khatri-Rao product of all other factors, ``(n_k, R)``."""
    others = sorted((k for k in range(tensor.ndim) if k != mode), key=lambda k: tensor.shape[k])
    result: Tensor = torch.tensordot(tensor.permute(mode, *others), factors[others.pop()], dims=([-1], [0]))
    while others:
        result = torch.einsum("...nr,nr->...r", result, factors[others.pop()])
    return result


def _gram(cores: Sequence[Tensor]) -> Tensor:
    """``Sᵀ S`` of a chain of cores from r to r', over the pairs of what closes it, ``(r' r, r' r)``."""
    product: Tensor | None = None
    for core in cores:
        step = torch.einsum("aib,cid->acbd", core, core).reshape(core.shape[0] ** 2, core.shape[2] ** 2)
        product = step if product is None else product @ step
    assert product is not None
    right, left = cores[0].shape[0], cores[-1].shape[2]
    return product.reshape(right, right, left, left).permute(2, 0, 3, 1).reshape(left * right, left * right)


def _contract(tensor: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """``T_(1) S`` for a chain of cores over all modes but the first; gives ``(n_1, r', r)``.

    The longer end is contracted first, which leaves least to carry on.
    """
    size, left, right = tensor.shape[0], cores[-1].shape[2], cores[0].shape[0]
    if tensor.shape[-1] >= tensor.shape[1]:
        result: Tensor = torch.tensordot(tensor, cores[-1], dims=([-1], [1]))  # (n_1, …, r_{d-1}, r')
        for core in reversed(cores[:-1]):
            rows = result.reshape(-1, core.shape[1] * core.shape[2], left)
            result = torch.einsum("xyl,ay->xal", rows, core.flatten(1))
        return result.reshape(size, right, left).transpose(1, 2)
    result = torch.tensordot(tensor, cores[0], dims=([1], [1])).movedim((-2, -1), (1, 2))  # (n_1, r, r_1, …)
    for core in cores[1:]:
        rows = result.reshape(size, right, core.shape[0] * core.shape[1], -1)
        result = torch.einsum("nryz,yb->nrbz", rows, core.flatten(0, 1))
    return result.reshape(size, right, left).transpose(1, 2)
