"""Fitting CP and tensor rings by alternating least squares.

With all cores but one fixed both are linear in that core, and the best one solves the normal equations
``X (Sᵀ S) = T_(k) S``, S being what the other cores make of it as a matrix (Kolda and Bader 2009, section 3.4; Zhao et
al. 2016, arXiv:1606.05535, section 3.2). S is never formed: ``Sᵀ S`` comes from one small matrix per core, and
``T_(k) S`` from contracting the tensor with one core after another, the longest mode first; what that leaves serves all
other modes of the sweep. So memory stays near that of the tensor, where S itself may be many times as large. Everything
is computed in float64.

Sweeps gain little each for a long time. So each starts from cores that are carried on along the last change, with
Nesterov's weights, and after a sweep that made the error larger from the best ones again (Mitchell, Ye and De Sterck
2020, arXiv:1810.05846).

Least squares alone let terms grow that cancel each other (De Silva and Lim 2008, arXiv:math/0607647): the error hardly
falls, and a small step of training in such cores is a large one in the tensor. So the normal equations get a ridge,
which shrinks with the error: an exact decomposition stays exact. Trained weights come out with smaller errors, too,
and white noise with errors up to 2 % larger.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SWEEPS = 60
"""How many at most."""

QUICK_SWEEPS = 12
"""How many tell about what a decomposition will come to: errors above 0.3 within a tenth of it."""

_CONVERGED = 1e-5
"""Relative change of the error in a sweep."""

_RIDGE = 3e-3
"""What is added to the diagonal of the normal equations, as a share of its mean and of the last relative error."""

_LEAST_RIDGE = 1e-9
"""A share that keeps them solvable."""


def fit_cp(tensor: Tensor, start: Sequence[Tensor], *, sweeps: int = SWEEPS) -> tuple[list[Tensor], float]:
    """Improve the factors of a CP until they change little.

    Args:
        tensor: Shape ``(n_1, …, n_d)``, not all zero.
        start: Factors ``(n_k, R)``.
        sweeps: How many at most.

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
    order, last = tensor.ndim, max(range(tensor.ndim), key=lambda k: tensor.shape[k])
    places = [*(k for k in range(order) if k != last), last]
    tensor = tensor.permute(places).double()
    square = float(tensor.square().sum())

    def sweep(factors: Sequence[Tensor], ridge: float) -> tuple[list[Tensor], float]:
        factors, grams = list(factors), [factor.t() @ factor for factor in factors]
        shared = torch.tensordot(tensor, factors[-1], dims=([-1], [0]))
        for k in range(order):
            gram = torch.stack([*grams[:k], *grams[k + 1 :]]).prod(0)
            target = _project(tensor, factors) if k == order - 1 else _project_shared(shared, factors[:-1], k)
            factors[k] = solved(gram, target, ridge)
            grams[k] = factors[k].t() @ factors[k]
        rest = square - 2 * float((target * factors[-1]).sum()) + float((gram * grams[-1]).sum())
        return factors, math.sqrt(max(rest, 0.0) / square)

    factors, error = repeated(sweep, [start[k].double() for k in places], sweeps)
    return [factors[places.index(k)] for k in range(order)], error


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


def fit_ring(tensor: Tensor, start: Sequence[Tensor], *, sweeps: int = SWEEPS) -> tuple[list[Tensor], float]:
    """Improve the cores of a ring until they change little.

    Args:
        tensor: Shape ``(n_1, …, n_d)``, d ≥ 3, not all zero.
        start: Cores ``(r_{k-1}, n_k, r_k)`` with ``r_d = r_0``.
        sweeps: How many at most.

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
    order, longest = tensor.ndim, max(range(tensor.ndim), key=lambda k: tensor.shape[k])
    places = [(longest + 1 + k) % order for k in range(order)]  # a ring begins anywhere
    tensor = tensor.permute(places).double().contiguous()
    square = float(tensor.square().sum())

    def sweep(cores: Sequence[Tensor], ridge: float) -> tuple[list[Tensor], float]:
        cores, steps = list(cores), [_step(core) for core in cores]
        shared = torch.tensordot(tensor, cores[-1], dims=([-1], [1])).movedim(-1, 0)  # (r_0, n_1, …, n_{d-1}, r_{d-1})
        for k in range(order):
            left, size, right = cores[k].shape
            gram = _gram([*steps[k + 1 :], *steps[:k]], right, left)
            target = _contract(tensor.movedim(-1, 0), cores[:-1]) if k == order - 1 else _around(shared, cores[:-1], k)
            target = target.reshape(size, left * right)
            found = solved(gram, target, ridge)
            cores[k] = found.reshape(size, left, right).transpose(0, 1).contiguous()
            steps[k] = _step(cores[k])
        rest = square - 2 * float((target * found).sum()) + float(((found @ gram) * found).sum())
        return cores, math.sqrt(max(rest, 0.0) / square)

    cores, error = repeated(sweep, [start[k].double() for k in places], sweeps)
    return [cores[places.index(k)] for k in range(order)], error


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


def repeated(
    sweep: Callable[[Sequence[Tensor], float], tuple[list[Tensor], float]], start: Sequence[Tensor], sweeps: int
) -> tuple[list[Tensor], float]:
    """Improve cores until they change little.

    Args:
        sweep: From cores and a share of ridge to new cores and their error.
        start: The first cores.
        sweeps: How many at most.

    Returns:
        The best cores of all sweeps, and their error.

    Example:
        >>> halved = lambda cores, ridge: ([cores[0] / 2], float(cores[0] / 2))
        >>> repeated(halved, [torch.ones(())], 3)[1] < 0.2
        True
    """
    (best, error), before, run = sweep(start, max(_RIDGE, _LEAST_RIDGE)), None, 0
    for _ in range(sweeps - 1):
        share = run / (run + 3)
        ahead = best if before is None else [new + share * (new - old) for new, old in zip(best, before, strict=True)]
        found, reached = sweep(ahead, max(_RIDGE * error, _LEAST_RIDGE))
        gain = error - reached
        if gain > 0:
            before, best, error = best, found, reached
        if gain > _CONVERGED * error:
            run += 1
        elif run == 0:
            break
        else:
            run = 0
    return best, error


def solved(gram: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Solve normal equations ``X (G + ridge · mean(diag G) · I) = T``.

    Args:
        gram: G, ``(m, m)``, positive semidefinite.
        target: T, ``(n, m)``.
        ridge: A share of the mean of G's diagonal.

    Returns:
        X, ``(n, m)``.

    Example:
        >>> solved(2 * torch.eye(2), torch.ones(1, 2), 0.0)
        tensor([[0.5000, 0.5000]])
    """
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):  # by rounding
        exact: Tensor = torch.linalg.solve(damped, target.t()).t()
        return exact
    return torch.cholesky_solve(target.t(), factor).t()


def _project(tensor: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``T_(d)`` times the Khatri-Rao product of all factors but the last, ``(n_d, R)``."""
    others = sorted(range(tensor.ndim - 1), key=lambda k: tensor.shape[k])
    result: Tensor = torch.tensordot(tensor.permute(-1, *others), factors[others.pop()], dims=([-1], [0]))
    while others:
        result = torch.einsum("...nr,nr->...r", result, factors[others.pop()])
    return result


def _project_shared(shared: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """The same for another mode, of a tensor ``(n_1, …, n_{d-1}, R)`` that was contracted with the last factor."""
    others = sorted((k for k in range(len(factors)) if k != mode), key=lambda k: shared.shape[k])
    result = shared.permute(mode, *others, -1)
    while others:
        result = torch.einsum("...nr,nr->...r", result, factors[others.pop()])
    return result


def _step(core: Tensor) -> Tensor:
    """What a core does to pairs of ranks, ``(r r, r' r')``."""
    return torch.einsum("aib,cid->acbd", core, core).reshape(core.shape[0] ** 2, core.shape[2] ** 2)


def _gram(steps: Sequence[Tensor], right: int, left: int) -> Tensor:
    """``Sᵀ S`` of a chain from r to r', over the pairs of what closes it, ``(r' r, r' r)``."""
    product = steps[0]
    for step in steps[1:]:
        product = product @ step
    return product.reshape(right, right, left, left).permute(2, 0, 3, 1).reshape(left * right, left * right)


def _around(shared: Tensor, cores: Sequence[Tensor], place: int) -> Tensor:
    """``T_(k) S``, ``(n_k, r_{k-1}, r_k)``, from what the last core has left, ``(r_0, n_1, …, n_{d-1}, r_{d-1})``."""
    for core in cores[:place]:
        shared = torch.tensordot(core, shared, dims=([0, 1], [0, 1]))
    for core in reversed(cores[place + 1 :]):
        shared = torch.tensordot(shared, core, dims=([-2, -1], [1, 2]))
    return shared.movedim(1, 0)


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
