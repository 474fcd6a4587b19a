"""Ranks that a weight can have, their errors, and the best ranks for all weights."""

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenzoo.factorizations import CP, BlockTT, Factorization, TensorRing, TensorTrain, Tucker
from tenzoo.factorizations.decomposition import scaled_to_safety, wide_modes

_FITTED = 8
"""How many ranks are tried of a format whose errors only a decomposition tells."""


@dataclass(frozen=True)
class Candidate:
    """One way to store a weight.

    Args:
        rank: Ranks of the factorization; None is the dense weight.
        cost: Its number under the budget, such as its parameters.
        loss: Its part of the loss of the whole model.

    Example:
        >>> Candidate((2, 3), cost=52, loss=0.25).rank
        (2, 3)
    """

    rank: tuple[int, ...] | None
    cost: float
    loss: float


def rank_errors(tensor: Tensor, kind: type[Factorization]) -> dict[tuple[int, ...], float]:
    """Ranks of growing size, and the squared relative error that each leaves.

    For tensor trains, block tensor trains and Tucker the ranks grow one at a time, where a parameter keeps most. Each
    rank r cuts off the singular values of one unfolding beyond the r-th; a share ``1 - Σ_{i>r} σ_i² / Σ_i σ_i²`` of the
    squared norm is kept, and the shares are multiplied, as if the cuts had nothing to do with one another. That is at
    least what the worst cut leaves out and at most what all of them do, as the error of the decomposition is (Oseledets
    2011, theorem 2.2; De Lathauwer et al. 2000, property 10). The error of a CP of three modes and of a ring is that of
    a decomposition which is cut short, at up to eight ranks; those of a CP between them are interpolated, and a ring
    has the ranks of a train, which is an open ring, besides. A CP of a matrix is one product of two matrices, as a
    train is, and its errors are those of the singular values.

    Args:
        tensor: Finite, of the factorization's shape.
        kind: The format.

    Returns:
        From rank one to the largest that has fewer parameters than the tensor.

    Example:
        >>> from tenzoo.factorizations import TensorTrain
        >>> rank_errors(torch.eye(4), TensorTrain)[(1,)]
        0.75
    """
    if not tensor.any():
        return {kind._usable_rank(tuple(tensor.shape), kind._resolve(tuple(tensor.shape), 1)): 0.0}
    shape, (tensor, _) = tuple(tensor.shape), scaled_to_safety(tensor)
    is_matrix = len(wide_modes(shape)) <= 2
    if kind is CP:
        return _of_matrix(tensor) if is_matrix else _interpolated(_fitted(tensor, kind))
    if kind is TensorRing:  # a train is a ring with the first rank 1, and its errors are known without a decomposition
        open_rings = {(1, *rank): error for rank, error in rank_errors(tensor, TensorTrain).items()}
        both = open_rings if is_matrix else _fitted(tensor, kind) | open_rings
        return dict(sorted(both.items(), key=lambda item: kind._count(shape, item[0])))
    left_out = [_left_out(matrix) for matrix in _unfoldings(tensor, kind)]
    return _grown(shape, kind, left_out)


def allocate(candidates: Sequence[Sequence[Candidate]], budget: float) -> list[Candidate]:
    """Choose one candidate for each weight, with a small total loss and a total cost within a budget.

    Every weight starts with its cheapest candidate. Then the step that reduces the loss most per cost is taken, again
    and again, along the lower convex hull of each weight's candidates. The rest of the budget goes to the best
    candidates that still fit. The chosen costs never exceed the budget.

    Args:
        candidates: The candidates of each weight, at least one.
        budget: Largest sum of costs.

    Raises:
        ValueError: If the cheapest candidates already cost more.

    Example:
        >>> one = [Candidate((1,), 1, 1.0), Candidate((2,), 2, 0.5), Candidate(None, 4, 0.0)]
        >>> other = [Candidate((1,), 1, 0.1), Candidate(None, 2, 0.0)]
        >>> [choice.rank for choice in allocate([one, other], 4)]
        [(2,), None]
    """
    hulls = [_hull(row) for row in candidates]
    chosen = [hull[0] for hull in hulls]
    spent = sum(choice.cost for choice in chosen)
    if spent > budget:
        raise ValueError(f"expected a budget of at least {math.ceil(spent):,}, which rank one takes, got {budget:,.0f}")
    steps = [(_slope(hull[0], hull[1]), k, 1) for k, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, k, step = heapq.heappop(steps)
        if spent - chosen[k].cost + hulls[k][step].cost > budget:
            continue  # the later ones of this weight cost more still
        spent += hulls[k][step].cost - chosen[k].cost
        chosen[k] = hulls[k][step]
        if step + 1 < len(hulls[k]):
            heapq.heappush(steps, (_slope(hulls[k][step], hulls[k][step + 1]), k, step + 1))
    while True:
        room = budget - spent
        gains = [
            (_slope(chosen[k], other), k, other)
            for k, row in enumerate(candidates)
            for other in row
            if chosen[k].cost < other.cost <= chosen[k].cost + room and other.loss < chosen[k].loss
        ]
        if not gains:
            return chosen
        _, k, best = min(gains, key=lambda gain: gain[:2])
        spent += best.cost - chosen[k].cost
        chosen[k] = best


def _slope(first: Candidate, second: Candidate) -> float:
    """Change of loss per cost; below zero, and the lower the better."""
    return (second.loss - first.loss) / (second.cost - first.cost)


def _hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The lower convex hull from the cheapest candidate to the one of least loss: costs rise, losses fall."""
    hull: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: (candidate.cost, candidate.loss)):
        if hull and candidate.loss >= hull[-1].loss:
            continue
        if hull and candidate.cost == hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return hull


# --- errors --------------------------------------------------------------------------------------------------------


def _unfoldings(tensor: Tensor, kind: type[Factorization]) -> list[Tensor]:
    """One matrix per rank, whose singular values that rank cuts off."""
    if kind is Tucker:
        return [tensor.movedim(k, 0).flatten(1) for k in range(tensor.ndim)]
    if kind is BlockTT:
        half = tensor.ndim // 2
        order = [k + side for k in range(half) for side in (0, half)]
        tensor = tensor.permute(order).reshape([tensor.shape[k] * tensor.shape[k + half] for k in range(half)])
    return [tensor.reshape(math.prod(tensor.shape[:k]), -1) for k in range(1, tensor.ndim)]


def _left_out(matrix: Tensor) -> list[float]:
    """Share of the squared norm that ranks 0, 1, 2, … leave out, in float64."""
    matrix = matrix.double()
    gram = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
    squares = torch.linalg.eigvalsh(gram).clamp_(min=0)  # ascending
    tails = torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)
    return [float(tail) for tail in tails / tails[0]]


def _grown(
    shape: tuple[int, ...], kind: type[Factorization], left_out: Sequence[Sequence[float]]
) -> dict[tuple[int, ...], float]:
    dense = math.prod(shape)
    rank = (1,) * len(left_out)
    errors: dict[tuple[int, ...], float] = {}
    while (size := kind._count(shape, rank)) < dense:
        if kind._usable_rank(shape, rank) == rank:
            kept = [1 - tails[r] for tails, r in zip(left_out, rank, strict=True)]
            errors[rank] = 1 - (kept[0] if len(shape) == 2 else math.prod(kept))  # both ranks of a matrix cut the same

        def gain(k: int, rank: tuple[int, ...] = rank, size: int = size) -> float:
            more = kind._count(shape, _raised(rank, k)) - size
            return math.log((1 - left_out[k][rank[k] + 1]) / (1 - left_out[k][rank[k]])) / more

        raisable = [k for k, r in enumerate(rank) if r + 1 < len(left_out[k])]
        useful = [k for k in raisable if kind._usable_rank(shape, _raised(rank, k)) == _raised(rank, k)]
        if useful:
            rank = _raised(rank, max(useful, key=gain))
        elif len(raisable) == len(rank):  # one alone would be of no use, as in a Tucker of a matrix
            rank = tuple(r + 1 for r in rank)
        else:
            break
    return errors


def _raised(rank: tuple[int, ...], k: int) -> tuple[int, ...]:
    return (*rank[:k], rank[k] + 1, *rank[k + 1 :])


def _of_matrix(tensor: Tensor) -> dict[tuple[int, ...], float]:
    """Those of a CP of a tensor with at most two modes of more than one index."""
    shape = tuple(tensor.shape)
    rows = next((size for size in shape if size > 1), 1)
    left_out = _left_out(tensor.reshape(rows, -1))
    ranks = range(1, min(len(left_out), math.ceil(math.prod(shape) / sum(shape))))
    return {(rank,): left_out[rank] for rank in ranks}


def _fitted(tensor: Tensor, kind: type[CP | TensorRing]) -> dict[tuple[int, ...], float]:
    shape = tuple(tensor.shape)
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def usable(rank: int) -> tuple[int, ...]:
        return kind._usable_rank(shape, kind._resolve(shape, rank))

    def smaller(rank: int) -> bool:
        return rank <= math.prod(shape) and kind._count(shape, usable(rank)) < math.prod(shape)

    ranks = dict.fromkeys(usable(rank) for rank in _spread(_largest(smaller)))
    closed = [rank for rank in ranks if kind is CP or rank[0] > 1]
    least, errors = 1.0, {}
    with torch.no_grad():
        for rank in closed:  # more ranks never do worse
            errors[rank] = least = min(least, kind._quick_error(tensor, rank) ** 2)
    return errors


def _interpolated(errors: Mapping[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """Errors of all ranks of a CP from those of some, their logarithms linear between them."""
    known = [(rank, math.log(max(error, 1e-12))) for (rank,), error in errors.items()]
    every = dict(errors)
    for (low, first), (high, last) in itertools.pairwise(known):
        for rank in range(low + 1, high):
            every[(rank,)] = math.exp(first + (last - first) * (rank - low) / (high - low))
    return dict(sorted(every.items()))


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest number from 1 on up to which a condition holds; 0 if it does not hold for 1."""
    low, high = 0, 1
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _spread(largest: int) -> list[int]:
    """Up to eight numbers from 1 to the largest, at about equal ratios."""
    if largest < 1:
        return []
    powers = [largest ** (k / (_FITTED - 1)) for k in range(_FITTED)]
    return sorted({round(power) for power in powers})
