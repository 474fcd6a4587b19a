"""A training step of single large layers, against torch's dense ones and against tltorch's."""

import functools
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.estimates import CASES, Case, agreement
from benchmarks.report import Ratio, Report, Table
from benchmarks.rivals import IMPLEMENTATIONS, note_on, tltorch_if_installed, tltorch_layer, try_rival
from benchmarks.steps import Step, in_turns, layer_step, on_threads
from tenzoo.layers import Tensorization, TensorizedConv2d, TensorizedEmbedding, TensorizedLinear
from tenzoo.layers.tensorization import split_size

_ROUNDS = 7
_EIGHTH = 1 / 8
_TABLE_RANK = 32
_WAYS = ("auto", "reconstruct", "contract")
_NOTE = (
    "Forward and backward, {threads} threads, at most 7 rounds; the embedding with a step of Adam. The convolution of "
    "3 × 3 sees {batch} images of {side} × {side}, channels_last; the linear layer {batch} rows; the table is asked "
    "for {indices:,} rows. Convolution and linear layer have an eighth of the dense parameters; tltorch has the same "
    "ranks where its formats are the same. Dense ones are limited by FLOPs, and reconstructing adds to them; "
    "contracting saves most of them, until the bytes of the narrow layers in between, and of CP's one channel per "
    "group, count. A dense table is limited by bytes: its gradient and Adam go through all of it, for however few rows."
)


def layers(
    rounds: int,
    *,
    channels: int = 512,
    side: int = 14,
    batch: int = 128,
    features: int = 4096,
    table: tuple[int, int] = (50_000, 768),
    indices: int = 4096,
    cases: Sequence[Case] = CASES,
    threads: int = 2,
) -> Report:
    """Train a convolution, a linear layer and an embedding, and see how well their costs are estimated.

    Args:
        rounds: How often each variant has its turn, up to 7.
        channels: Of the convolution, in and out.
        side: Of its images.
        batch: Images, and rows of the linear layer.
        features: Of the linear layer, in and out.
        table: Shape of the embedding.
        indices: How many rows are asked for.
        cases: The layers whose costs are estimated.
        threads: To compute on.
    """
    rounds = min(rounds, _ROUNDS)
    skipped: list[str] = []
    with on_threads(threads), tltorch_if_installed():
        times: dict[str, list[float]] = {}
        times |= in_turns(_convolutions(channels, side, batch, skipped), rounds)
        times |= in_turns(_linears(features, batch, skipped), rounds, steps_per_turn=2)
        embeddings, memory = _embeddings(table, indices, skipped)
        times |= in_turns(embeddings, rounds, steps_per_turn=2)
        estimates = agreement(rounds, cases)
    title = (
        f"layers: convolution {channels}→{channels}, linear {features}→{features}, embedding {table[0]:,} × {table[1]}"
    )
    note = _NOTE.format(batch=batch, side=side, indices=indices, threads=threads) + note_on(skipped)
    return Report(title, note, ("ms/step", 1e3), times, _ratios(times), [memory, *estimates])


def _ratios(times: Mapping[str, Sequence[float]]) -> list[Ratio]:
    ratios = []
    for kind in ("conv CP", "conv Tucker", "linear TT", "linear TT, whole modes", "linear Tucker"):
        auto, *ways = (f"{kind}, {way}" for way in _WAYS)
        faster = min(ways, key=lambda way: median(times[way]))
        ratios.append(Ratio.of(times, auto, f"{kind.split()[0]} dense", target=0.7))
        ratios.append(Ratio.of(times, auto, faster, target=1.1))
    ratios.append(Ratio.of(times, "embedding TT", "embedding dense", target=1.0))
    theirs = [name for name in times if name.startswith("tltorch")]
    ratios += [Ratio.of(times, name, f"{name.split()[1]} dense") for name in theirs]
    return ratios


def _ours(kind: str, make: Callable[..., nn.Module], x: Tensor) -> dict[str, Step]:
    return {f"{kind}, {way}": layer_step(make(implementation=way), x) for way in _WAYS}


def _convolutions(channels: int, side: int, batch: int, skipped: list[str]) -> dict[str, Step]:
    torch.manual_seed(0)
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    arguments: dict[str, Any] = {"kernel_size": 3, "padding": 1, "bias": False}
    dense = nn.Conv2d(channels, channels, **arguments).to(memory_format=torch.channels_last)
    steps = {"conv dense": layer_step(dense, x)}
    for kind, name in (("CP", "cp"), ("Tucker", "tucker")):
        make = functools.partial(TensorizedConv2d, channels, channels, **arguments, factorization=name, rank=_EIGHTH)
        steps |= _ours(f"conv {kind}", make, x)
        ranks = make(device="meta").factorization.rank
        rank: Any = ranks[0] if kind == "CP" else [ranks[0], ranks[2], 3, 3]  # theirs is (out, in, k, k)
        sizes = channels, channels, (3, 3)
        theirs = functools.partial(tltorch_layer, "FactorizedConv", *sizes, padding=1, factorization=name, rank=rank)
        _add_theirs(steps, skipped, f"conv {kind}", theirs, x)
    return steps


def _linears(features: int, batch: int, skipped: list[str]) -> dict[str, Step]:
    torch.manual_seed(0)
    x = torch.randn(batch, features)
    steps = {"linear dense": layer_step(nn.Linear(features, features), x)}
    whole: Tensorization = [[features], [features]]
    for kind, name, modes in (("TT", "tt", None), ("TT, whole modes", "tt", whole), ("Tucker", "tucker", None)):
        make = functools.partial(
            TensorizedLinear, features, features, factorization=name, rank=_EIGHTH, tensorization=modes
        )
        steps |= _ours(f"linear {kind}", make, x)
    for kind, name, size in (("BlockTT", "blocktt", split_size(features)), ("Tucker", "tucker", (features,))):
        theirs = functools.partial(tltorch_layer, "FactorizedLinear", size, size, factorization=name, rank=_EIGHTH)
        _add_theirs(steps, skipped, f"linear {kind}", theirs, x)
    return steps


def _add_theirs(
    steps: dict[str, Step], skipped: list[str], kind: str, make: Callable[..., nn.Module], x: Tensor
) -> None:
    def made(implementation: str) -> Step:
        return layer_step(make(implementation=implementation), x)

    for implementation in IMPLEMENTATIONS:
        name = f"tltorch {kind}, {implementation}"
        try_rival(steps, skipped, name, functools.partial(made, implementation))


# --- embedding -----------------------------------------------------------------------------------------------------


def _embeddings(table: tuple[int, int], indices: int, skipped: list[str]) -> tuple[dict[str, Step], Table]:
    torch.manual_seed(0)
    index = torch.randint(table[0], (indices,))
    held: dict[str, int] = {}
    steps: dict[str, Step] = {}
    makers: dict[str, Callable[[], nn.Module]] = {
        "embedding dense": lambda: nn.Embedding(*table),
        "embedding TT": lambda: TensorizedEmbedding(*table, factorization="tt", rank=_TABLE_RANK),
    }
    for name, make in makers.items():
        steps[name], held[name] = _adam_step(make(), index)

    def theirs() -> Step:
        layer = tltorch_layer("FactorizedEmbedding", *table, factorization="blocktt", rank=_TABLE_RANK)
        step, held["tltorch embedding BlockTT"] = _adam_step(layer, index)
        return step

    try_rival(steps, skipped, "tltorch embedding BlockTT", theirs)
    rows = []
    for name in steps:
        ratio = Ratio(name, (held[name] / held["embedding dense"],), 0.05 if name == "embedding TT" else None)
        rows.append([name, f"{held[name] / 1e6:.2f}", f"{ratio.median:.4f}", ratio.verdict])
    return steps, (("parameters, gradients and Adam's moments", "MB", "/ dense", "target"), rows)


def _adam_step(layer: nn.Module, index: Tensor) -> tuple[Step, int]:
    """A step, and the bytes of parameters, gradients and moments after the first one."""
    optimizer = torch.optim.Adam(layer.parameters())
    backward = layer_step(layer, index)

    def step() -> None:
        backward()
        optimizer.step()

    step()
    held: list[Tensor] = []
    for parameter in layer.parameters():
        held += [parameter, *(value for value in optimizer.state[parameter].values() if value.ndim > 0)]
        held += [] if parameter.grad is None else [parameter.grad]
    return step, sum(tensor.numel() * tensor.element_size() for tensor in held)
