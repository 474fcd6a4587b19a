"""What the zoo holds: ``tenzoo list`` its entries, ``tenzoo describe`` the layers of one of them."""

import copy
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tenzoo.cores import find_core_groups
from tenzoo.factorizations import Factorization
from tenzoo.layers import TensorizedLayer
from tenzoo.layers.cost import Counter

RESULTS = "results.json"
"""Beside the configs: by the name of a config, what was published of it and what was measured."""

_MIN_WIDTH = 120
"""Columns of a terminal that the tables need."""


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


def print_layers(layers: Sequence[Layer], batch_size: int | None, *, as_json: bool) -> None:
    """Print what :func:`describe` found."""
    if as_json:
        print(json.dumps([{**asdict(layer), "compression": layer.compression} for layer in layers], indent=1))
        return
    per_batch = "" if batch_size is None else f" for a batch of {batch_size}"
    table = Table(title=f"Layers; millions of multiplications{per_batch}, estimated ms of each way in a training step")
    for column in ("layer", "weight", "cores", "core group"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "÷", "mult.", "way", "reconstruct", "contract"):
        table.add_column(column, justify="right", no_wrap=True)
    weights = [layer for layer in layers if len(layer.shape) > 1]
    for layer in weights:
        made = "" if layer.rank is None or layer.modes is None else f"{layer.factorization} {_ranks(layer.rank)}"
        modes = "" if layer.modes is None or tuple(layer.modes) == tuple(layer.shape) else f" of {_times(layer.modes)}"
        times = layer.milliseconds or {}
        table.add_row(
            layer.name or layer.kind,
            _times(layer.shape),
            made + modes,
            layer.core_group or "",
            f"{layer.parameters:,}",
            f"{layer.compression:.1f}" if layer.rank else "",
            "" if layer.multiplications is None else f"{layer.multiplications / 1e6:,.2f}",
            layer.contraction or "",
            *(f"{times[key]:.2f}" if key in times else "" for key in ("reconstruct", "contract")),
        )
    number, dense = totals(layers)
    multiplications = [layer.multiplications for layer in layers if layer.multiplications is not None]
    others = sum(layer.parameters for layer in layers if len(layer.shape) <= 1)
    if others:
        table.add_row("norms", "", "", "", f"{others:,}", "", "", "", "", "")
    table.add_section()
    table.add_row(
        "total", "", "", "", f"{number:,}", f"{dense / number:.1f}", f"{sum(multiplications) / 1e6:,.2f}", "", "", ""
    )
    _wide_console().print(table)


def _times(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def _ranks(rank: Sequence[int]) -> str:
    return f"rank {rank[0]}" if len(set(rank)) == 1 else f"ranks {', '.join(map(str, rank))}"


@dataclass(frozen=True)
class Entry:
    """One config, as ``tenzoo list`` shows it.

    Args:
        config: Path.
        model: What is trained, and in which format; how to make it first, if that is missing.
        data: On what.
        parameters: Number of parameters; None of a network that is not made yet.
        compression: Dense parameters per parameter; likewise.
        published: Of a paper, if there is such a result.
        measured: With this very config.
    """

    config: str
    model: str
    data: str
    parameters: int | None
    compression: float | None
    published: str | None
    measured: str | None


def read_results(folder: Path) -> dict[str, dict[str, str]]:
    """Results by name of a config; none if there is no such file.

    Raises:
        ValueError: If the file holds something else.
    """
    path = folder / RESULTS
    if not path.is_file():
        return {}
    try:
        results: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {str(path)!r}, got {error}") from error
    if not isinstance(results, dict) or not all(map(_is_result, results.values())):
        raise ValueError(f"expected names of configs with texts `published` and `measured` in {str(path)!r}")
    return results


def _is_result(value: object) -> bool:
    return isinstance(value, dict) and all(
        name in ("published", "measured") and isinstance(text, str) for name, text in value.items()
    )


def print_entries(entries: Sequence[Entry], *, as_json: bool) -> None:
    """Print the entries of the zoo."""
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    table = Table(title="The zoo; ÷ is how many times fewer parameters than dense")
    for column in ("config", "model", "data"):
        table.add_column(column, overflow="fold", min_width=len(column), no_wrap=column == "config")
    for column in ("parameters", "÷"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("published", "measured"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        number = "" if entry.parameters is None else f"{entry.parameters:,}"
        ratio = "" if entry.compression is None else f"{entry.compression:,.1f}"
        table.add_row(
            Path(entry.config).stem, entry.model, entry.data, number, ratio, entry.published or "", entry.measured or ""
        )
    _wide_console().print(table)


def _wide_console() -> Console:
    """In a narrow terminal, or in none, columns would shrink to nothing."""
    console = Console()
    return console if console.width >= _MIN_WIDTH else Console(width=_MIN_WIDTH)
