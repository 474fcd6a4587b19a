"""What a model is made of, layer by layer."""

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tenzoo.cores import find_core_groups
from tenzoo.factorizations import Factorization
from tenzoo.layers import TensorizedLayer
from tenzoo.layers.cost import Counter


@dataclass(frozen=True)
class Layer:
    """One weight of a model, as ``tenzoo describe`` shows it.

    Args:
        name: Qualified name of the module.
        kind: Class of the module.
        shape: Of the dense weight.
        factorization: Name of the format; None for a dense weight.
        modes: Shape of the tensor of cores.
        rank: Its ranks.
        parameters: Their number, bias included, but for those of a layer further up.
        dense_parameters: What the dense layer has.
        multiplications: Those of a forward pass, all calls together; None where it
            is not known.
        contraction: The implementation that training takes; both where one call takes another than the next.
        milliseconds: Estimates for a step of training, by implementation, all calls together.
        core_group: Name of the core group.
    """

    name: str
    kind: str
    shape: Sequence[int]
    factorization: str | None
    modes: Sequence[int] | None
    rank: Sequence[int] | None
    parameters: int
    dense_parameters: int
    multiplications: float | None
    contraction: str | None
    milliseconds: Mapping[str, float] | None
    core_group: str | None

    @property
    def compression(self) -> float:
        """Dense parameters per parameter."""
        return self.dense_parameters / self.parameters if self.parameters else 1.0


def describe(model: nn.Module, inputs: Tensor | None = None) -> list[Layer]:
    """The weights of a model, one by one.

    Args:
        model: Dense and tensorized layers.
        inputs: An input of it on the meta device, for which operations are counted.
    """
    groups = {id(core): group.name for group in find_core_groups(model) for core in group.cores}
    seen = {} if inputs is None else _run(model, inputs)
    layers: list[Layer] = []
    met: set[nn.Parameter] = set()
    for name, module in _with_weights(model):
        if isinstance(module, TensorizedLayer | Factorization):
            layers.append(_tensorized(name, module, seen.get(name), groups))
        else:
            own = dict.fromkeys(module.parameters(recurse=False))
            number = sum(parameter.numel() for parameter in own if parameter not in met)
            layers.append(_dense(name, module, number, seen.get(name)))
        met.update(module.parameters(recurse=False))
    return layers


def totals(layers: Sequence[Layer]) -> tuple[int, int]:
    """Number of parameters, and of those of the dense layers."""
    return sum(layer.parameters for layer in layers), sum(layer.dense_parameters for layer in layers)


def _with_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with parameters of their own, one of cores as a whole."""
    done: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in done:
            continue
        if isinstance(module, TensorizedLayer | Factorization):
            done.update(module.modules())
            yield name, module
        elif any(True for _ in module.parameters(recurse=False)):
            yield name, module


@dataclass
class _Calls:
    """What a module is called with in a forward pass, and what it multiplies, its listed children left out."""

    inputs: list[Any] = field(default_factory=list)
    multiplications: float = 0


def _run(model: nn.Module, inputs: Tensor) -> dict[str, _Calls]:
    ghost = copy.deepcopy(model).to("meta").eval()
    seen: dict[str, _Calls] = {}
    counter = Counter()
    open_calls: list[list[float]] = []  # what was multiplied before, and by children

    def begin(*_: Any) -> None:
        open_calls.append([counter.total.multiplications, 0.0])

    def end(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        before, children = open_calls.pop()
        multiplications = counter.total.multiplications - before
        if open_calls:
            open_calls[-1][1] += multiplications
        calls = seen.setdefault(name, _Calls())
        calls.inputs.extend([*args, *kwargs.values()][:1])
        calls.multiplications += multiplications - children

    for name, module in _with_weights(ghost):
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(functools.partial(end, name), with_kwargs=True)
    with torch.no_grad(), counter:
        ghost(inputs)
    return seen


def _tensorized(
    name: str,
    module: TensorizedLayer[Any] | Factorization,
    seen: _Calls | None,
    groups: Mapping[int, str],
) -> Layer:
    weight = module if isinstance(module, Factorization) else module.factorization
    number = sum(parameter.numel() for parameter in module.parameters())
    cores = sum(core.numel() for core in weight.cores)
    shape: Sequence[int] = weight.shape
    multiplications, contraction, milliseconds = float(weight.multiplications), "reconstruct", None
    dense = math.prod(weight.shape)
    if isinstance(module, TensorizedLayer):
        with torch.no_grad():
            shape = tuple(module.dense_weight().shape)
        dense = math.prod(shape)
        multiplications, contraction = math.nan, module.implementation
        if seen is not None:
            multiplications, contraction, milliseconds = _estimated(module, seen.inputs)
    return Layer(
        name,
        type(module).__name__,
        shape,
        weight.name,
        weight.shape,
        weight.rank,
        number,
        number - cores + dense,
        None if math.isnan(multiplications) else multiplications,
        contraction,
        milliseconds,
        groups[id(weight.cores[0])],
    )


def _estimated(module: TensorizedLayer[Any], inputs: Sequence[Tensor]) -> tuple[float, str, dict[str, float]]:
    """Operations, implementations and milliseconds of some calls in training."""
    costs, device = module.costs, module.factorization.cores[0].device.type
    multiplications, ways, milliseconds = 0.0, dict[str, None](), dict[str, float]()
    for x in inputs:
        positions = module.positions(x)
        way = module.choose(positions, "training")
        reconstructed = costs.reconstruct + costs.dense.at(positions)
        multiplications += (costs.contract.at(positions) if way == "contract" else reconstructed).multiplications
        ways[way] = None
        for key, seconds in costs.seconds(positions, "training", device).items():
            milliseconds[key] = milliseconds.get(key, 0.0) + 1e3 * seconds
    return multiplications, " and ".join(ways), milliseconds


def _dense(name: str, module: nn.Module, number: int, seen: _Calls | None) -> Layer:
    multiplications = None if seen is None else seen.multiplications
    kind, shape = type(module).__name__, tuple(next(module.parameters(recurse=False)).shape)
    return Layer(name, kind, shape, None, None, None, number, number, multiplications, None, None, None)
