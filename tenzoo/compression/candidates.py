"""Ways to store the weights of a network, and the best one for each."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One way to store a weight.

    Args:
        rank: Ranks of the factorization; None is the dense weight.
        cost: Its number under the budget, such as its parameters.
        loss: Its part of the loss of the whole model.
        factorization: Name of the format; None is the dense weight.

    Example:
        >>> Candidate((2, 3), cost=52, loss=0.25).rank
        (2, 3)
    """

    rank: tuple[int, ...] | None
    cost: float
    loss: float
    factorization: str | None = None


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
