"""The drawing of a network of cores, and what follows from it.

A core has legs: an int is a mode of the tensor, a string a bond with other cores. A bond of three or more cores is a
hyperedge, such as the rank of a CP.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeAlias

import opt_einsum
import torch
from torch import Tensor

from tenzoo.factorizations.init import core_std

Leg: TypeAlias = int | str
"""A mode of the tensor, counted from 0, or the name of a bond."""

Legs: TypeAlias = tuple[tuple[Leg, ...], ...]
"""The legs of each operand of a contraction."""

BondSizes: TypeAlias = Callable[[tuple[int, ...], int], Mapping[str, int]]
"""From ranks and the order of a tensor to the size of each bond."""

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class OrderError(ValueError):
    """A format has no tensors of an order. :meth:`~tenzoo.factorizations.Factorization.legs` raises it."""


class Holder(NamedTuple):
    """Where a leg is attached: the number of a core, and the dimension of that core."""

    core: int
    dim: int


class Edge(NamedTuple):
    """A bond of two cores that is the only connection of two parts of a network.

    Args:
        bond: Its name.
        modes: The modes of the tensor on one side.
        others: Those on the other side.
    """

    bond: str
    modes: frozenset[int]
    others: frozenset[int]


class Step(NamedTuple):
    """One contraction of a schedule.

    Args:
        places: The operands in the list of what is left, the last place first. They are taken out, and the result is
            appended.
        equation: For ``torch.einsum``.
    """

    places: tuple[int, ...]
    equation: str


class Schedule(NamedTuple):
    """An order in which a network is contracted, two operands at a time.

    Args:
        steps: The contractions.
        multiplications: Their multiplications.
        largest: Number of elements of the largest result.
    """

    steps: tuple[Step, ...]
    multiplications: int
    largest: int

    def __call__(self, operands: Sequence[Tensor]) -> Tensor:
        """Contract the operands."""
        left = list(operands)
        for places, equation in self.steps:
            left.append(_einsum(equation, [left.pop(place) for place in places]))
        return left[0]


def _einsum(equation: str, parts: Sequence[Tensor]) -> Tensor:
    """``torch.einsum``, on a GPU by elementwise products where a batched one would be of single columns or rows.

    Torch would compile a Triton kernel for these, which takes a C compiler, and seconds at the first call.
    """
    if len(parts) < 2 or parts[0].is_cpu or parts[0].is_meta:
        return torch.einsum(equation, *parts)
    terms, result = equation.split("->")
    first, second = terms.split(",")
    size = dict(zip(first + second, (*parts[0].shape, *parts[1].shape), strict=True))
    summed = "".join(leg for leg in size if leg not in result)
    groups = (
        [leg for leg in result if leg not in second],
        [leg for leg in result if leg not in first],
        [leg for leg in summed if leg in first and leg in second],
    )
    if min(math.prod(size[leg] for leg in group) for group in groups) > 1:
        return torch.einsum(equation, *parts)
    legs = result + summed
    left, right = (_in_order(part, term, legs) for part, term in zip(parts, (first, second), strict=True))
    product = left * right
    return product.sum(tuple(range(len(result), len(legs)))) if summed else product


def _in_order(tensor: Tensor, legs: str, wanted: str) -> Tensor:
    """Dimensions in another order, of the size 1 where a leg is missing."""
    tensor = tensor.permute([legs.index(leg) for leg in wanted if leg in legs])
    shape = iter(tensor.shape)
    return tensor.reshape([next(shape) if leg in legs else 1 for leg in wanted])


@lru_cache(maxsize=4096)
def schedule(operands: Legs, output: tuple[Leg, ...], sizes: frozenset[tuple[Leg, int]]) -> Schedule:
    """Find the order of a contraction, by the path of opt_einsum.

    Args:
        operands: The legs of each operand.
        output: The legs of the result.
        sizes: Pairs of a leg and its size.

    Example:
        >>> found = schedule((("n", 0), (0, "r"), ("r", 1)), ("n", 1), frozenset({("n", 9), (0, 8), ("r", 2), (1, 7)}))
        >>> found.multiplications, found([torch.ones(9, 8), torch.ones(8, 2), torch.ones(2, 7)]).shape
        (270, torch.Size([9, 7]))
    """
    size = dict(sizes)
    legs = list(dict.fromkeys(leg for operand in operands for leg in operand))
    symbol = {leg: opt_einsum.get_symbol(k) for k, leg in enumerate(legs)}
    written = [" ".join(symbol[leg] for leg in operand).replace(" ", "") for operand in (*operands, output)]
    shapes = [tuple(size[leg] for leg in operand) for operand in operands]
    path, _ = opt_einsum.contract_path(f"{','.join(written[:-1])}->{written[-1]}", *shapes, shapes=True)
    left, steps, multiplications, largest = list(operands), [], 0, 0
    for places in path:
        ordered = tuple(sorted(places, reverse=True))
        parts = [left.pop(place) for place in ordered]
        result = _result(parts, left, output)
        left.append(result)
        steps.append(Step(ordered, _equation(parts, result)))
        largest = max(largest, math.prod(size[leg] for leg in result))
        if len(parts) > 1:
            multiplications += math.prod(size[leg] for leg in {leg for part in parts for leg in part})
    return Schedule(tuple(steps), multiplications, largest)


def _result(
    parts: Sequence[tuple[Leg, ...]], left: Sequence[tuple[Leg, ...]], output: tuple[Leg, ...]
) -> tuple[Leg, ...]:
    """The legs of a result: of the last one as wanted, else shared ones first, as a batched product gives them."""
    if not left:
        return output
    wanted = {leg for operand in (*left, output) for leg in operand}
    met = [leg for part in parts for leg in part]
    shared = [leg for leg in parts[0] if met.count(leg) > 1]
    return tuple(leg for leg in dict.fromkeys([*shared, *met]) if leg in wanted)


def _equation(parts: Sequence[tuple[Leg, ...]], result: tuple[Leg, ...]) -> str:
    letter = dict(zip(dict.fromkeys(leg for part in parts for leg in part), _LETTERS, strict=False))
    return ",".join("".join(letter[leg] for leg in part) for part in parts) + "->" + "".join(letter[x] for x in result)


class Network:
    """The legs of the cores of a format, for one order of the tensor.

    Args:
        legs: Those of each core.
        order: Number of modes of the tensor.
        bond_sizes: From ranks to sizes of bonds, each of them 1 or one of the ranks.

    Attributes:
        legs: As given.
        order: As given.
        holders: Where each leg is attached.
        bonds: Names of the bonds, in order of first appearance.
        rank_of: The place of each bond's size among the ranks; None where it is 1.
        num_ranks: Number of ranks.

    Raises:
        TypeError: If a leg is not an int or a string.
        OrderError: If the legs have more modes than the tensor, or fewer.
        ValueError: If a mode has two cores, a core has a leg twice, or the sizes of bonds do not follow from ranks.

    Example:
        >>> matrix = Network([(0, "r"), ("r", 1)], 2, lambda rank, order: {"r": rank[0]})
        >>> matrix.num_ranks, matrix.core_shapes((4, 5), (2,)), matrix.is_tree
        (1, [(4, 2), (2, 5)], True)
    """

    def __init__(self, legs: Sequence[Sequence[Leg]], order: int, bond_sizes: BondSizes) -> None:
        self.legs: Legs = tuple(tuple(core) for core in legs)
        self.order = order
        self.holders = _holders(self.legs, order)
        self.bonds = tuple(leg for leg in self.holders if isinstance(leg, str))
        self.num_ranks = self._count_ranks(bond_sizes)
        self.rank_of = self._find_ranks(bond_sizes)

    def _count_ranks(self, bond_sizes: BondSizes) -> int:
        """The least number of ranks that gives each bond a size."""
        failed: Exception | None = None
        for number in range(len(self.bonds) + 1):
            try:
                sizes = bond_sizes((1,) * number, self.order)
            except (IndexError, KeyError, ValueError) as error:
                failed = error
                continue
            failed = None
            if set(self.bonds) <= set(sizes):
                return number
        if failed is not None:
            raise failed
        raise ValueError(f"expected a size for each of the bonds {list(self.bonds)} from `bond_sizes`")

    def _find_ranks(self, bond_sizes: BondSizes) -> dict[str, int | None]:
        probe = tuple(range(2, self.num_ranks + 2))  # numbers that tell the ranks apart
        sizes = bond_sizes(probe, self.order)
        for bond in self.bonds:
            if sizes[bond] not in (1, *probe):
                raise ValueError(
                    f"expected 1 or a rank as the size of bond {bond!r} in `bond_sizes`, got {sizes[bond]}"
                )
            if len(self.holders[bond]) == 1 and sizes[bond] != 1:
                raise ValueError(f"expected two cores or more with the bond {bond!r} in `legs`, got one")
        return {bond: None if sizes[bond] == 1 else sizes[bond] - 2 for bond in self.bonds}

    def sizes(self, shape: Sequence[int], rank: Sequence[int]) -> dict[Leg, int]:
        """The size of each leg."""
        bonds: dict[Leg, int] = {bond: 1 if k is None else rank[k] for bond, k in self.rank_of.items()}
        return {**dict(enumerate(shape)), **bonds}

    def core_shapes(self, shape: Sequence[int], rank: Sequence[int]) -> list[tuple[int, ...]]:
        """The shape of each core."""
        sizes = self.sizes(shape, rank)
        return [tuple([sizes[leg] for leg in core]) for core in self.legs]

    def num_parameters(self, shape: Sequence[int], rank: Sequence[int]) -> int:
        """Number of elements of all cores."""
        sizes = self.sizes(shape, rank)
        return sum([math.prod([sizes[leg] for leg in core]) for core in self.legs])

    def num_monomials(self, rank: Sequence[int]) -> int:
        """How many products of core elements sum up to one entry of the tensor."""
        return math.prod(1 if place is None else rank[place] for place in self.rank_of.values())

    def core_std(self, init_std: float, rank: Sequence[int]) -> float:
        """Standard deviation of the cores' entries that gives the tensor's the root mean square ``init_std``.

        See :func:`~tenzoo.factorizations.init.core_std`.
        """
        return core_std(init_std, num_monomials=self.num_monomials(rank), num_cores=len(self.legs))

    def fan_ins(self, shape: Sequence[int], rank: Sequence[int], inputs: Collection[int]) -> tuple[int, ...]:
        """How many products are summed where each core is multiplied to what comes from an input.

        The cores are multiplied one after the other, next always the one that leaves the fewest numbers, of equals the
        last. A leg is summed with the last core that has it.

        Args:
            shape: Of the tensor.
            rank: As the format has it.
            inputs: The modes that the tensor is multiplied by; the others are those of the output.

        Example:
            >>> train = Network([(0, "a"), ("a", 1, "b"), ("b", 2)], 3, lambda rank, order: dict(zip("ab", rank)))
            >>> train.fan_ins((4, 5, 6), (2, 3), inputs={1, 2})
            (2, 15, 6)
        """
        sizes = self.sizes(shape, rank)
        left = dict(enumerate(self.legs))
        open_legs: set[Leg] = set(inputs)
        fans: dict[int, int] = {}

        def after(core: int) -> tuple[set[Leg], set[Leg]]:
            """The legs that are summed with a core, and those that then are open."""
            others = {leg for number, legs in left.items() if number != core for leg in legs}
            every = open_legs | set(left[core])
            summed = {leg for leg in left[core] if leg not in others and (leg in inputs or isinstance(leg, str))}
            return summed, every - summed

        while left:
            core = min(left, key=lambda core: (math.prod(sizes[leg] for leg in after(core)[1]), -core))
            summed, open_legs = after(core)
            fans[core] = math.prod(sizes[leg] for leg in summed)
            del left[core]
        return tuple(fans[core] for core in range(len(self.legs)))

    def rank_of_edges(self, shape: Sequence[int], rank: Sequence[int]) -> tuple[int, ...]:
        """Ranks clipped to the largest that the unfoldings at the edges can have."""
        return self._clipped(rank, self._bounds_of_edges(tuple(shape)))

    @lru_cache(maxsize=1024)  # noqa: B019  (networks are kept as long as their formats are)
    def _bounds_of_edges(self, shape: tuple[int, ...]) -> dict[str, int]:
        return {
            edge.bond: min(math.prod(shape[mode] for mode in side) for side in (edge.modes, edge.others))
            for edge in self.edges
        }

    def rank_of_cores(self, shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """Ranks clipped until no core has a bond that is larger than all its other legs together.

        A larger bond makes nothing more: the core, a matrix with the bond as its columns, has no more independent
        columns than rows. At each index of a hyperedge the rest is a network by itself.
        """
        return self._rank_of_cores(shape, rank)

    @lru_cache(maxsize=4096)  # noqa: B019  (layers of one shape ask for the same ranks)
    def _rank_of_cores(self, shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        while True:
            sizes = self.sizes(shape, rank)
            bounds = {
                bond: min([math.prod([sizes[leg] for leg in others]) for others in sides])
                for bond, sides in self._other_legs.items()
            }
            clipped = self._clipped(rank, bounds)
            if clipped == rank:
                return clipped
            rank = clipped

    @cached_property
    def _other_legs(self) -> dict[str, list[list[Leg]]]:
        """For each bond of two cores, the other legs of either, without hyperedges."""
        return {
            bond: [
                [leg for leg in self.legs[core] if leg != bond and leg not in self.hyperedges]
                for core, _ in self.holders[bond]
            ]
            for bond in self.pairs
        }

    def _clipped(self, rank: Sequence[int], bounds: Mapping[str, int]) -> tuple[int, ...]:
        """Ranks clipped to bounds of bonds; one of several bonds to the largest of theirs, and only if all have one."""
        bounds_of_ranks = [
            [bounds.get(bond, r) for bond in bonds] for r, bonds in zip(rank, self._bonds_of_ranks, strict=True)
        ]
        return tuple([min(r, max(found, default=r)) for r, found in zip(rank, bounds_of_ranks, strict=True)])

    @cached_property
    def _bonds_of_ranks(self) -> list[list[str]]:
        """For each rank, the bonds that have it."""
        places = range(self.num_ranks)
        return [[bond for bond, place in self.rank_of.items() if place == each] for each in places]

    @cached_property
    def hyperedges(self) -> tuple[str, ...]:
        """Bonds of three or more cores."""
        return tuple(bond for bond in self.bonds if len(self.holders[bond]) > 2)

    @cached_property
    def pairs(self) -> tuple[str, ...]:
        """Bonds of two cores."""
        return tuple(bond for bond in self.bonds if len(self.holders[bond]) == 2)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Bonds that are the only connection of what lies on their sides, hyperedges left out."""
        found = []
        for bond in self.pairs:
            first, second = (self._reached(holder.core, without=bond) for holder in self.holders[bond])
            if first.isdisjoint(second):
                found.append(Edge(bond, *(frozenset(self._modes(side)) for side in (first, second))))
        return tuple(found)

    @cached_property
    def is_tree(self) -> bool:
        """Whether there is one way only from each core to each other, and no hyperedge."""
        connected = len(self._reached(0)) == len(self.legs)
        return connected and not self.hyperedges and len(self.edges) == len(self.pairs)

    @cached_property
    def has_loops(self) -> bool:
        """Whether bonds of two cores close a loop, as those of a ring."""
        return len(self.edges) < len(self.pairs)

    @cached_property
    def pairs_modes(self) -> bool:
        """Whether each core has two modes, k and k + order / 2, as the cores of a tensorized matrix have."""
        half = self.order // 2
        modes = [tuple(leg for leg in core if isinstance(leg, int)) for core in self.legs]
        return self.order % 2 == 0 and modes == [(k, k + half) for k in range(half)]

    @cached_property
    def has_factors(self) -> bool:
        """Whether each mode belongs to a core of its own that has one bond, as the factors of CP and Tucker."""
        return all(
            sum(isinstance(leg, int) for leg in self.legs[core]) == 1
            and sum(leg not in self.hyperedges for leg in self.legs[core] if isinstance(leg, str)) <= 1
            for core, _ in (self.holders[mode][0] for mode in range(self.order))
        )

    def _reached(self, start: int, without: str | None = None) -> set[int]:
        """Cores that bonds of two cores connect with one of them."""
        seen, pending = {start}, [start]
        while pending:
            for leg in self.legs[pending.pop()]:
                if isinstance(leg, str) and leg != without and len(self.holders[leg]) == 2:
                    new = {holder.core for holder in self.holders[leg]} - seen
                    seen |= new
                    pending += new
        return seen

    def _modes(self, cores: set[int]) -> list[int]:
        return [leg for core in cores for leg in self.legs[core] if isinstance(leg, int)]


def _holders(legs: Legs, order: int) -> dict[Leg, list[Holder]]:
    """Where each leg is attached, in order of first appearance; the legs are checked."""
    if not legs or not all(legs):
        raise ValueError(f"expected one leg or more for each core in `legs`, got {list(legs)}")
    holders: dict[Leg, list[Holder]] = {}
    for number, core in enumerate(legs):
        for dim, leg in enumerate(core):
            if not isinstance(leg, int | str) or isinstance(leg, bool):
                raise TypeError(f"expected ints for modes and strings for bonds in `legs`, got {leg!r}")
            holders.setdefault(leg, []).append(Holder(number, dim))
        if twice := [leg for leg, times in Counter(core).items() if times > 1]:
            raise ValueError(f"expected a leg once in a core in `legs`, got {twice[0]!r} twice in core {number}")
    for mode in dict.fromkeys([*range(order), *(leg for leg in holders if isinstance(leg, int))]):
        number = len(holders.get(mode, ()))
        if mode not in range(order):
            raise OrderError(f"expected modes from 0 to {order - 1} in `legs`, got {mode}")
        if number == 0:
            raise OrderError(f"expected one core with mode {mode} in `legs`, got none")
        if number > 1:
            raise ValueError(f"expected one core with mode {mode} in `legs`, got {number}")
    return holders
