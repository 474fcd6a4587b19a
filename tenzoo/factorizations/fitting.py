"""Decompositions of any network: singular values along the edges of a tree, alternating least squares with loops."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tenzoo.factorizations.als import SWEEPS, repeated, solved
from tenzoo.factorizations.decomposition import svd_size, truncated_svd
from tenzoo.factorizations.network import Edge, Leg, Network, Schedule, schedule

_BEGUN, _STARTS = 10, 2
"""Sweeps from each start, and how many starts, before the best one is chosen."""

_DIRECT, _GRADIENTS = 512, 10
"""Unknowns up to which normal equations are solved directly; conjugate gradients in each of the other problems."""


def unfolding(tensor: Tensor, edge: Edge) -> Tensor:
    """The matrix whose rank is the least size of a bond: the modes on one side of it are its rows.

    Example:
        >>> network = Network([(0, "r"), ("r", 1, 2)], 3, lambda rank, order: {"r": rank[0]})
        >>> unfolding(torch.ones(4, 5, 6), network.edges[0]).shape
        torch.Size([4, 30])
    """
    rows, columns = sorted(edge.modes), sorted(edge.others)
    return tensor.permute(*rows, *columns).reshape(math.prod(tensor.shape[mode] for mode in rows), -1)


def fit_tree(tensor: Tensor, network: Network, rank: Sequence[int]) -> list[Tensor]:
    """The cores of a tree, by one truncated singular value decomposition per edge, from the leaves to a root.

    The squared error is at most that of the best approximation times the number of edges (Grasedyck 2010, SIAM J.
    Matrix Anal. Appl. 31(4), for hierarchical Tucker; Oseledets 2011 for trains).

    Args:
        tensor: Shape ``(n_1, …, n_d)``.
        network: A tree.
        rank: Ranks that the shape can use.

    Example:
        >>> network = Network([(0, "r"), ("r", 1)], 2, lambda rank, order: {"r": rank[0]})
        >>> from tenzoo.factorizations.decomposition import tensorly_on_torch
        >>> with tensorly_on_torch():
        ...     left, right = fit_tree(torch.eye(3), network, (3,))
        >>> torch.allclose(left @ right, torch.eye(3), atol=1e-6)
        True
    """
    sizes = network.sizes(tensor.shape, rank)
    cores: dict[int, Tensor] = {}
    legs: list[Leg] = list(range(network.order))
    root, *others = _from_root(network)
    for core, bond in reversed(others):
        own = [leg for leg in network.legs[core] if leg in legs]
        rest = [leg for leg in legs if leg not in own]
        matrix = tensor.permute([legs.index(leg) for leg in [*own, *rest]])
        matrix = matrix.reshape(math.prod(sizes[leg] for leg in own), -1)
        U, S, Vh = truncated_svd(matrix, sizes[bond])
        cores[core] = _arranged(U.reshape(*(sizes[leg] for leg in own), -1), [*own, bond], network.legs[core])
        tensor = (S.unsqueeze(1) * Vh).reshape(-1, *(sizes[leg] for leg in rest))
        legs = [bond, *rest]
    cores[root[0]] = _arranged(tensor, legs, network.legs[root[0]])
    return [cores[core] for core in range(len(cores))]


def tree_fit_size(shape: Sequence[int], network: Network, rank: Sequence[int]) -> int:
    """Numbers held at the peak of :func:`fit_tree`, the tensor itself not counted.

    Example:
        >>> network = Network([(0, "r"), ("r", 1)], 2, lambda rank, order: {"r": rank[0]})
        >>> tree_fit_size((1000, 10), network, (5,)) < 8 * 1000 * 10
        True
    """
    sizes = network.sizes(shape, rank)
    legs, peak = set[Leg](range(network.order)), 0
    for core, bond in reversed(_from_root(network)[1:]):
        own = set(network.legs[core]) & legs
        rows, columns = (math.prod(sizes[leg] for leg in side) for side in (own, legs - own))
        peak = max(peak, 2 * rows * columns + svd_size(rows, columns, sizes[bond]))
        legs = (legs - own) | {bond}
    return peak + network.num_parameters(shape, rank)


def fit_network(
    tensor: Tensor, network: Network, rank: Sequence[int], *, sweeps: int = SWEEPS
) -> tuple[list[Tensor], float]:
    """The cores of any network, by alternating least squares.

    It starts from noise twice, and goes on from the better result.

    Args:
        tensor: Shape ``(n_1, …, n_d)``, not all zero.
        network: Of cores that the tensor is multilinear in.
        rank: Its ranks.
        sweeps: How many at most.

    Returns:
        The cores, and their relative error ``‖T − T̂‖ / ‖T‖``; in float64.

    Example:
        >>> network = Network([(0, "r"), (1, "r"), (2, "r")], 3, lambda rank, order: {"r": rank[0]})
        >>> fit_network(torch.ones(2, 3, 4), network, (1,))[1] < 1e-6
        True
    """
    tensor = tensor.double()
    square = float(tensor.square().sum())
    problems, legs = _problems(network, tensor.shape, rank), _shared_legs(network)

    def sweep(cores: Sequence[Tensor], ridge: float) -> tuple[list[Tensor], float]:
        cores = list(cores)
        for k, problem in enumerate(problems):
            others = [*cores[:k], *cores[k + 1 :]]
            found, inner, made = problem.solve(tensor, others, _arranged(cores[k], legs[k], problem.legs), ridge)
            cores[k] = _arranged(found, problem.legs, legs[k]).contiguous()
        return cores, math.sqrt(max(square - 2 * inner + made, 0.0) / square)

    starts = [_noise(tensor, network, rank, seed) for seed in range(_STARTS)]
    begun = [repeated(sweep, start, min(_BEGUN, sweeps)) for start in starts]
    cores, error = min(begun, key=lambda fit: fit[1])
    if sweeps > _BEGUN:
        cores, error = repeated(sweep, cores, sweeps)
    shapes = network.core_shapes(tensor.shape, rank)
    return [core.reshape(shape) for core, shape in zip(cores, shapes, strict=True)], error


def network_fit_size(shape: Sequence[int], network: Network, rank: Sequence[int]) -> int:
    """Numbers of 4 bytes held at the peak of :func:`fit_network`, the tensor itself not counted.

    Example:
        >>> network = Network([(0, "r"), (1, "r"), (2, "r")], 3, lambda rank, order: {"r": rank[0]})
        >>> network_fit_size((64, 9, 64), network, (16,)) < 16 * 64 * 9 * 64
        True
    """
    problems = _problems(network, shape, rank)
    systems = max(p.target.largest + p.tensor.largest + (p.gram.largest if p.direct else 0) for p in problems)
    grams = max(p.unknowns**2 if p.direct else 0 for p in problems)
    return 2 * (4 * math.prod(shape) + 2 * systems + 3 * grams + 8 * network.num_parameters(shape, rank))


class _Problem(NamedTuple):
    """With all other cores fixed, the tensor is linear in one; its best core solves a least-squares problem.

    The others make ``S``, from the bonds of the core to the modes that it does not have. The normal equations
    ``X SᵀS = T S`` are contracted from the cores and copies of them; S itself is never formed. Where ``SᵀS`` is large,
    it is not formed either, and a few conjugate gradients take the place of its inverse.
    """

    legs: tuple[Leg, ...]
    """Of X: the modes of the core, then its bonds."""
    shape: tuple[int, ...]
    unknowns: int
    """Columns of X."""
    gram: Schedule
    """``SᵀS``, from the others and their copies."""
    target: Schedule
    """``T S``, from the tensor and the others."""
    tensor: Schedule
    """``X Sᵀ``, from X and the others."""

    @property
    def direct(self) -> bool:
        return self.unknowns <= _DIRECT

    def solve(
        self, tensor: Tensor, others: Sequence[Tensor], start: Tensor, ridge: float
    ) -> tuple[Tensor, float, float]:
        """X, its inner product ``⟨T S, X⟩``, and the square ``‖X Sᵀ‖²``."""
        target = self.target([tensor, *others]).reshape(-1, self.unknowns)
        if self.direct:
            gram = self.gram([*others, *others]).reshape(self.unknowns, self.unknowns)
            found = solved(gram, target, ridge)
            return found.reshape(self.shape), float((target * found).sum()), float(((found @ gram) * found).sum())
        found = self._conjugate_gradients(target, others, start.reshape(target.shape), ridge)
        made = self.tensor([found.reshape(self.shape), *others])
        return found.reshape(self.shape), float((target * found).sum()), float(made.square().sum())

    def _conjugate_gradients(self, target: Tensor, others: Sequence[Tensor], start: Tensor, ridge: float) -> Tensor:
        def applied(x: Tensor) -> Tensor:
            return self.target([self.tensor([x.reshape(self.shape), *others]), *others]).reshape(x.shape)

        first = applied(start)
        damping = ridge * float((start * first).sum() / start.square().sum().clamp(min=1e-300))
        found, rest = start, target - first - damping * start
        direction, square = rest, float(rest.square().sum())
        for _ in range(_GRADIENTS):
            moved = applied(direction) + damping * direction
            curvature = float((direction * moved).sum())
            if square == 0 or curvature <= 0:
                break
            found, rest = found + square / curvature * direction, rest - square / curvature * moved
            before, square = square, float(rest.square().sum())
            direction = rest + square / before * direction
        return found


def _problems(network: Network, shape: Sequence[int], rank: Sequence[int]) -> list[_Problem]:
    """One for each core. Bonds of a single core, which have the size 1, are left out."""
    sizes = network.sizes(shape, rank)
    cores = _shared_legs(network)
    copies = [tuple(_copied(leg) for leg in core) for core in cores]
    items = frozenset([*sizes.items(), *((_copied(leg), size) for leg, size in sizes.items())])
    modes = tuple(range(network.order))
    found = []
    for k, core in enumerate(cores):
        own: tuple[Leg, ...] = tuple(leg for leg in core if isinstance(leg, int))
        bonds: tuple[Leg, ...] = tuple(leg for leg in core if isinstance(leg, str))
        others = tuple(cores[:k] + cores[k + 1 :])
        found.append(
            _Problem(
                (*own, *bonds),
                tuple(sizes[leg] for leg in (*own, *bonds)),
                math.prod(sizes[bond] for bond in bonds),
                schedule((*others, *copies[:k], *copies[k + 1 :]), (*bonds, *map(_copied, bonds)), items),
                schedule((modes, *others), (*own, *bonds), items),
                schedule(((*own, *bonds), *others), modes, items),
            )
        )
    return found


def _shared_legs(network: Network) -> list[tuple[Leg, ...]]:
    """The legs of each core but for bonds that it alone has."""
    return [
        tuple(leg for leg in core if isinstance(leg, int) or len(network.holders[leg]) > 1) for core in network.legs
    ]


def _noise(tensor: Tensor, network: Network, rank: Sequence[int], seed: int) -> list[Tensor]:
    """Cores of a tensor of about the same size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = network.sizes(tensor.shape, rank)
    size = float(torch.linalg.vector_norm(tensor)) / math.sqrt(tensor.numel())
    std = network.core_std(size, rank)
    shapes = [tuple(sizes[leg] for leg in core) for core in _shared_legs(network)]
    return [(std * torch.randn(s, generator=generator, dtype=torch.float64)).to(tensor.device) for s in shapes]


def _copied(leg: Leg) -> Leg:
    """The same leg in a second copy of the network, which shares the modes."""
    return leg if isinstance(leg, int) else f"{leg}'"


def _from_root(network: Network) -> list[tuple[int, str]]:
    """Each core after the one that leads to it from a root, and the bond that does; the root has an empty one.

    The root is the core with most bonds, which is the core tensor of a Tucker.
    """
    root = max(range(len(network.legs)), key=lambda core: len(network.legs[core]))
    found, pending = [(root, "")], [root]
    seen = {root}
    while pending:
        core = pending.pop(0)
        for leg in network.legs[core]:
            for other, _ in network.holders[leg]:
                if other not in seen:
                    seen.add(other)
                    found.append((other, str(leg)))
                    pending.append(other)
    return found


def _arranged(tensor: Tensor, legs: Sequence[Leg], wanted: Sequence[Leg]) -> Tensor:
    """Dimensions in another order; legs that are missing get the size 1."""
    present = [leg for leg in wanted if leg in legs]
    tensor = tensor.permute([list(legs).index(leg) for leg in present])
    for dim, leg in enumerate(wanted):
        if leg not in legs:
            tensor = tensor.unsqueeze(dim)
    return tensor
