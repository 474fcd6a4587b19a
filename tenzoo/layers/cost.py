"""What reconstructing a weight costs, and what contracting it does: the model behind ``implementation="auto"``.

The time of an operation is taken as its multiplications over a rate, plus its memory traffic over a bandwidth, plus a
constant for starting it. What runs is counted, on the meta device, where nothing is computed. Both ways cost an amount
per call and one per position (a row of a linear layer, a pixel of a convolution, an index of an embedding), where a
convolution has pixels that it reads and others that it writes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Phase: TypeAlias = Literal["training", "inference", "cached"]
"""With a backward pass; without one; or without one and with a dense weight that is kept between calls."""


class Rates(NamedTuple):
    """What a device does in a second."""

    multiplications: float
    """Multiplications of a large matrix product."""
    elements: float
    """float32 numbers read or written."""
    launches: float
    """Operations started."""


RATES: Mapping[str, Rates] = {"cpu": Rates(2.5e11, 5e9, 1e5), "cuda": Rates(2e14, 7e11, 3e4)}
"""By type of device: of two cores of a server, and of an H100 with TF32. Only their proportions matter.

A card starts 9e4 operations a second where nothing else is done, and a product of small matrices takes 80 µs of the
host in training; 3e4 is in between.
"""


class Positions(NamedTuple):
    """How much a layer has to do: rows, pixels of the whole batch, or indices.

    Example:
        >>> Positions(2, 3).plus(Positions(1, 1)).times(2)
        Positions(outputs=6, inputs=8)
    """

    outputs: float
    inputs: float
    """As many, but for convolutions; with what is padded by other than zeros."""

    def plus(self, other: "Positions") -> "Positions":
        """Those of both."""
        return Positions(self.outputs + other.outputs, self.inputs + other.inputs)

    def beyond(self, other: "Positions") -> "Positions":
        """How many more these are."""
        return Positions(max(self.outputs - other.outputs, 0), max(self.inputs - other.inputs, 0))

    def times(self, number: float) -> "Positions":
        """Those of so many calls."""
        return Positions(self.outputs * number, self.inputs * number)


_NARROW_CHANNELS = 12
_NARROW = 3.0
"""A convolution of fewer channels per group takes so many times as long as its multiplications should."""


@dataclass(frozen=True)
class Cost:
    """Work of some operations; adds up, and scales with how often they run.

    Args:
        multiplications: Multiplications.
        elements: Numbers read and written.
        launches: Operations.
        delay: Multiplications that could have been done in the time that narrow operations waste.

    Example:
        >>> Cost(2, 3, 1) + 2 * Cost(1, 1, 1)
        Cost(multiplications=4, elements=5, launches=3, delay=0)
    """

    multiplications: float = 0
    elements: float = 0
    launches: float = 0
    delay: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.multiplications + other.multiplications,
            self.elements + other.elements,
            self.launches + other.launches,
            self.delay + other.delay,
        )

    def __rmul__(self, times: float) -> "Cost":
        return Cost(times * self.multiplications, times * self.elements, times * self.launches, times * self.delay)

    def seconds(self, rates: Rates) -> float:
        """Estimated time on a device."""
        multiplications = (self.multiplications + self.delay) / rates.multiplications
        return multiplications + self.elements / rates.elements + self.launches / rates.launches


@dataclass(frozen=True)
class LinearCost:
    """Cost as a function of the positions.

    Args:
        call: Whatever their number.
        output: Of each that is written.
        input: Of each that is read, where these are others.
    """

    call: Cost
    output: Cost
    input: Cost = Cost()

    def at(self, positions: Positions) -> Cost:
        """The cost of one call."""
        return self.call + self.growth(positions)

    def growth(self, positions: Positions) -> Cost:
        """What of it is not the same for all calls."""
        return positions.outputs * self.output + positions.inputs * self.input


@dataclass(frozen=True)
class Costs:
    """Both ways to compute a layer, once forward.

    Args:
        reconstruct: Of the dense weight, per call.
        dense: What follows with a dense weight.
        contract: With the cores.
    """

    reconstruct: Cost
    dense: LinearCost
    contract: LinearCost
    _leads: Mapping[tuple[str, str], tuple[float, float, float]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Every call of a layer chooses, so what does not depend on the call is done here.
        leads = {(phase, device): self._lead(phase, device) for phase in get_args(Phase) for device in RATES}
        object.__setattr__(self, "_leads", leads)

    def _lead(self, phase: Phase, device: str) -> tuple[float, float, float]:
        all_seconds = [self.seconds(Positions(*given), phase, device) for given in ((0, 0), (1, 0), (0, 1))]
        call, output, input_ = (seconds["contract"] - seconds["reconstruct"] for seconds in all_seconds)
        return call, output - call, input_ - call

    def cheaper(self, positions: Positions, phase: Phase, device: str) -> Literal["reconstruct", "contract"]:
        """The implementation with the shorter estimated time; arguments as in :meth:`seconds`."""
        call, output, input_ = self._leads[phase, device if device in RATES else "cuda"]
        return "contract" if call + output * positions.outputs + input_ * positions.inputs < 0 else "reconstruct"

    def seconds(self, positions: Positions, phase: Phase, device: str) -> dict[str, float]:
        """Estimated time of a call for each implementation; a backward pass takes twice the time of the forward one.

        Args:
            positions: Of the call.
            phase: What is needed with the output.
            device: Type of the device; an unknown one is taken for a GPU.
        """
        rates = RATES.get(device, RATES["cuda"])
        passes = 3 if phase == "training" else 1
        reconstruct = Cost() if phase == "cached" else self.reconstruct
        return {
            "reconstruct": passes * (reconstruct + self.dense.at(positions)).seconds(rates),
            "contract": passes * self.contract.at(positions).seconds(rates),
        }


def count(function: Callable[..., Tensor], *inputs: Tensor) -> Cost:
    """What a function does with inputs on the meta device.

    Example:
        >>> count(torch.mm, torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta"))
        Cost(multiplications=24.0, elements=26, launches=1, delay=0.0)
    """
    counter = Counter()
    with torch.no_grad(), counter:
        function(*inputs)
    return counter.total


def independence(first: Positions, second: Positions, third: Positions) -> float:
    """How much three inputs tell apart what is read and what is written; 0 if nothing.

    Example:
        >>> independence(Positions(1, 4), Positions(2, 8), Positions(3, 12))
        0
    """
    wide, high = second.plus(first.times(-1)), third.plus(first.times(-1))
    return wide.outputs * high.inputs - high.outputs * wide.inputs


def count_per_position(
    function: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], positions: Sequence[Positions]
) -> LinearCost:
    """Split the cost of a function into that of a call and those of a position.

    Args:
        function: Of one input on the meta device.
        inputs: A small and a large one, and a third where what is read and what is written are not in proportion.
        positions: How many there are in each.

    Example:
        >>> weight = torch.empty(3, 4, device="meta")
        >>> inputs = [torch.empty(rows, 4, device="meta") for rows in (10, 50)]
        >>> positions = [Positions(10, 10), Positions(50, 50)]
        >>> count_per_position(lambda x: x @ weight.t(), inputs, positions).at(Positions(1000, 1000)).multiplications
        12000.0
    """
    small, large, *third = (count(function, x) for x in inputs)
    first, last, *other = positions
    more = large + -1 * small
    if not other:
        output, input_ = (1 / (last.outputs - first.outputs)) * more, Cost()
    else:
        wide, high, most = last.plus(first.times(-1)), other[0].plus(first.times(-1)), third[0] + -1 * small
        scale = 1 / independence(first, last, *other)
        output = scale * (high.inputs * more + -wide.inputs * most)
        input_ = scale * (wide.outputs * most + -high.outputs * more)
    call = small + -first.outputs * output + -first.inputs * input_
    return LinearCost(call, output, input_)


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is done within its context.

    Attributes:
        total: So far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = Cost()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return result  # a view
        formula = flop_registry.get(func._overloadpacket)
        multiplications = 0.0 if formula is None else formula(*args, **(kwargs or {}), out_val=result) / 2
        narrow = func._overloadpacket is torch.ops.aten.convolution and args[1].shape[1] < _NARROW_CHANNELS
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        delay = (_NARROW - 1) * multiplications if narrow else 0.0
        self.total += Cost(multiplications, sum(tensor.numel() for tensor in tensors), 1, delay)
        return result
