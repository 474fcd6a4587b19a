"""Which ranks a tensor could have in a format, and how far the decomposition would be from it."""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from tenzoo.factorizations.fitting import unfolding
from tenzoo.factorizations.network import Network

if TYPE_CHECKING:
    from tenzoo.factorizations.base import Factorization

Errors: TypeAlias = dict[tuple[int, ...], float]
"""From ranks to squared relative errors ``‖T − T̂‖² / ‖T‖²``, the number of parameters growing."""

_FITTED = 8
"""How many ranks are tried of a format whose errors only a decomposition tells."""


def errors_of_tree(tensor: Tensor, kind: type["Factorization"]) -> Errors:
    """Errors of a tree, from the singular values of its unfoldings.

    The ranks grow one at a time, where a parameter keeps most. Each bond of size r cuts off the singular values of one
    unfolding beyond the r-th; a share ``1 - Σ_{i>r} σ_i² / Σ_i σ_i²`` of the squared norm is kept, and the shares are
    multiplied, as if the cuts were independent. That is at least what the worst cut leaves out and at most what all of
    them do, as the error of the decomposition is (Oseledets 2011, theorem 2.2; De Lathauwer et al. 2000, property 10).

    Args:
        tensor: Finite, not all zero.
        kind: The format, whose network is a tree.
    """
    shape = tuple(tensor.shape)
    network = kind.network(len(shape))
    growth = _Growth(tensor, network)
    rank = (1,) * network.num_ranks
    errors: Errors = {}

    def useful(steps: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [step for step in steps if kind.usable_rank(shape, step) == step]

    steps = useful([rank])
    while (size := network.num_parameters(shape, rank)) < math.prod(shape):
        kept = growth.kept(rank)
        if steps:
            errors[rank] = 1 - kept

        def gain(step: tuple[int, ...], kept: float = kept, size: int = size) -> float:
            return math.log(growth.kept(step) / kept) / (network.num_parameters(shape, step) - size)

        single, together = growth.steps(rank)
        steps = useful(single) or useful(together)
        if not steps:
            break
        rank = max(steps, key=gain)
    return errors


def fitted_errors(
    tensor: Tensor, kind: type["Factorization"], error: Callable[[Tensor, tuple[int, ...]], float]
) -> Errors:
    """Errors of short decompositions at up to eight uniform ranks; more ranks never do worse.

    Args:
        tensor: Finite, not all zero.
        kind: The format.
        error: The relative error of a decomposition of some ranks.
    """
    shape = tuple(tensor.shape)
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def usable(rank: int) -> tuple[int, ...]:
        return kind.clipped_rank(shape, rank)

    def smaller(rank: int) -> bool:
        return rank <= math.prod(shape) and kind.network(len(shape)).num_parameters(shape, usable(rank)) < math.prod(
            shape
        )

    least, errors = 1.0, Errors()
    with torch.no_grad():
        for rank in dict.fromkeys(usable(rank) for rank in _spread(_largest(smaller))):
            errors[rank] = least = min(least, error(tensor, rank) ** 2)
    return errors


def interpolated(errors: Errors) -> Errors:
    """Errors of all single ranks from those of some, their logarithms linear between them.

    Example:
        >>> [round(error, 6) for error in interpolated({(1,): 1.0, (3,): 0.25}).values()]
        [1.0, 0.5, 0.25]
    """
    known = [(rank, math.log(max(error, 1e-12))) for (rank,), error in errors.items()]
    every = dict(errors)
    for (low, first), (high, last) in itertools.pairwise(known):
        for rank in range(low + 1, high):
            every[(rank,)] = math.exp(first + (last - first) * (rank - low) / (high - low))
    return dict(sorted(every.items()))


def errors_of_matrix(tensor: Tensor) -> Errors:
    """Errors of a single rank, of a tensor with at most two modes of more than one index."""
    shape = tuple(tensor.shape)
    rows = next((size for size in shape if size > 1), 1)
    tails = _tails(tensor.reshape(rows, -1))
    ranks = range(1, min(len(tails), math.ceil(math.prod(shape) / sum(shape))))
    return {(rank,): tails[rank] for rank in ranks}


class _Growth:
    """The shares that the unfoldings of a tree keep, and the steps from one rank to the next."""

    def __init__(self, tensor: Tensor, network: Network) -> None:
        tails: dict[frozenset[frozenset[int]], list[float]] = {}
        places: dict[frozenset[frozenset[int]], set[int]] = {}
        for edge in network.edges:
            place = network.rank_of[edge.bond]
            if edge.modes and edge.others and place is not None:
                sides = frozenset([edge.modes, edge.others])
                if sides not in tails:  # of two bonds that cut the same, such as those of a matrix, the smaller one
                    tails[sides] = _tails(unfolding(tensor, edge))
                places.setdefault(sides, set()).add(place)
        self.cuts = [(tails[sides], tuple(sorted(found))) for sides, found in places.items()]
        """For each cut what its ranks leave out, and where its ranks stand."""
        self.groups = sorted({found for _, found in self.cuts})
        self.limits = [
            min((len(left_out) - 1 for left_out, found in self.cuts if place in found), default=math.inf)
            for place in range(network.num_ranks)
        ]

    def kept(self, rank: Sequence[int]) -> float:
        """The product of all shares."""
        return math.prod(1 - tails[min([rank[place] for place in places])] for tails, places in self.cuts)

    def steps(self, rank: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """The ranks with those of one cut raised by one, for each cut; and with all of them raised."""
        open_ = {place for place, r in enumerate(rank) if r < self.limits[place]}
        raised = [_raised(rank, group) for group in self.groups if open_.issuperset(group)]
        return raised, [_raised(rank, open_)] if open_ else []


def _raised(rank: Sequence[int], places: Collection[int]) -> tuple[int, ...]:
    return tuple(r + 1 if place in places else r for place, r in enumerate(rank))


def _tails(matrix: Tensor) -> list[float]:
    """Share of the squared norm that ranks 0, 1, 2, … leave out, in float64."""
    matrix = matrix.double()
    gram = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
    squares = torch.linalg.eigvalsh(gram).clamp_(min=0)  # ascending
    tails = torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)
    return [float(tail) for tail in tails / tails[0]]


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
