"""A training step of a small residual network in every format, against the dense network and against rivals."""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.methods import methods_in_turns
from benchmarks.report import Ratio, Report, Table, spread
from benchmarks.rivals import note_on, rival_networks, tltorch_if_installed, try_rival
from benchmarks.steps import Step, forward_step, in_turns, network_step, on_threads, saved_bytes, sgd
from tenzoo.layers import Implementation
from tenzoo.models import CIFARResNet
from tenzoo.tasks import ImageClassificationTask

FORMATS: Mapping[str, tuple[str | None, int | None]] = {
    "dense": (None, None),
    "TR 10": ("tr", 10),
    "TT 16": ("tt", 16),
    "Tucker 16": ("tucker", 16),
    "CP 50": ("cp", 50),
    "BlockTT 12": ("btt", 12),
}
_RIVAL_ROUNDS = 7
_NOTE = (
    "CIFARResNet({depth}) on {images} random images of {side} × {side}, channels_last, SGD with Nesterov momentum, "
    "{threads} threads. A step is forward, cross-entropy, backward and the optimizer's. Convolutions are limited by "
    "FLOPs; batch norm, ReLU and shortcuts, the same in all networks, by bytes. Rebuilding a kernel of at most 36,864 "
    "entries costs the launches of 2 to 10 operations and those of their gradients, however many images there are. "
    "Where contracting is estimated to be cheaper it takes its place: fewer FLOPs, for narrow images in between that "
    "are written, read and kept for the backward pass. bf16 is autocast. The last three variants are under Lightning, "
    "without loggers."
)


def networks(
    rounds: int,
    *,
    images: int = 128,
    rival_images: int = 32,
    side: int = 32,
    depth: int = 20,
    names: Sequence[str] = tuple(FORMATS),
    steps: int = 2,
    threads: int = 2,
) -> Report:
    """Train a CIFAR ResNet, dense and in each format, in float32 and bfloat16, and with DAS and SAM.

    Args:
        rounds: How often each variant has its turn; the rivals have at most 7.
        images: Batch size.
        rival_images: Batch size of the comparison with the rivals.
        side: Of the images, in pixels.
        depth: Of our networks.
        names: Of the formats, "dense" and "TR 10" among them.
        steps: Steps per turn under Lightning; a turn of training is one elsewhere.
        threads: To compute on.
    """
    with on_threads(threads):
        batch, small = _batch(images, side), _batch(rival_images, side)
        times: dict[str, list[float]] = {}
        for autocast in (False, True):  # groups of their own: what is compared stands side by side
            group = {
                _in(autocast, name): network_step(_network(name, depth), *batch, autocast=autocast) for name in names
            }
            times |= in_turns(group, rounds)
        passes = {f"forward, {name}": forward_step(_network(name, depth), batch[0]) for name in ("dense", "TR 10")}
        times |= in_turns(passes, rounds, steps_per_turn=3)
        saved = {
            name: [saved_bytes(_network(name, depth, way), batch) for way in ("auto", "reconstruct")] for name in names
        }
        rivals, skipped = _rivals(min(rounds, _RIVAL_ROUNDS), depth, names, small)
        times |= methods_in_turns(
            "TR 10",
            lambda sam: ImageClassificationTask(_network("TR 10", depth), optimizer=sgd, sam=sam),
            batch,
            rounds,
            alpha=0.001,
            rho=0.05,
            steps=steps,
        )
    title = f"networks: a step of ResNet-{depth}, tensorized and dense"
    note = _NOTE.format(depth=depth, images=images, side=side, threads=threads) + note_on(skipped)
    return Report(title, note, ("ms/step", 1e3), times, _ratios(times, names), [_memory_table(saved), rivals])


def _batch(number: int, side: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(number, 3, side, side, generator=generator)
    labels = torch.randint(10, (number,), generator=generator)
    return images.contiguous(memory_format=torch.channels_last), labels


def _network(name: str, depth: int, implementation: Implementation = "auto") -> nn.Module:
    torch.manual_seed(0)
    factorization, rank = FORMATS[name]
    network = CIFARResNet(depth, factorization=factorization, rank=rank, implementation=implementation)
    return network.to(memory_format=torch.channels_last)


def _in(autocast: bool, name: str) -> str:
    return f"bf16, {name}" if autocast else name


def _ratios(times: Mapping[str, Sequence[float]], names: Sequence[str]) -> list[Ratio]:
    ratio = functools.partial(Ratio.of, times)
    others = [name for name in names if name != "dense"]
    return [
        *(ratio(name, "dense", target=1.1 if name == "TR 10" else 1.15) for name in others),
        *(ratio(_in(True, name), _in(True, "dense"), target=1.15 if name == "TR 10" else None) for name in others),
        ratio(_in(True, "dense"), "dense"),
        ratio("forward, TR 10", "forward, dense", target=1.02),
        ratio("TR 10, DAS", "TR 10, Lightning", target=1.01),
        ratio("TR 10, SAM", "TR 10, Lightning", target=2.05),
    ]


def _memory_table(saved: Mapping[str, Sequence[int]]) -> Table:
    dense = saved["dense"][0]
    rows = []
    for name, (size, reconstructing) in saved.items():
        ratio = Ratio(name, (size / dense,), None if name == "dense" else 1.05)
        rows.append([name, f"{size / 1e6:.1f}", f"{ratio.median:.3f}", ratio.verdict, f"{reconstructing / dense:.3f}"])
    return ("saved for the backward pass, float32", "MB", "/ dense", "target", "reconstruct / dense"), rows


# --- rivals --------------------------------------------------------------------------------------------------------


def _rivals(rounds: int, depth: int, names: Sequence[str], batch: tuple[Tensor, Tensor]) -> tuple[Table, list[str]]:
    """Ours and theirs on a smaller batch, each in the layout that it works in."""
    steps: dict[str, Step] = {}
    parameters: dict[str, int] = {}
    skipped: list[str] = []

    def made(name: str, make: Callable[[], nn.Module], images: Tensor) -> Step:
        network = make()
        parameters[name] = sum(parameter.numel() for parameter in network.parameters())
        return network_step(network, images, batch[1])

    for name in names:
        steps[f"tenzoo {name}"] = made(f"tenzoo {name}", functools.partial(_network, name, depth), batch[0])
    with tltorch_if_installed():
        for name, make in rival_networks(depth).items():
            try_rival(steps, skipped, name, functools.partial(made, name, make, batch[0].contiguous()))
        times = in_turns(steps, rounds)
    rows = []
    for name, row in times.items():
        ratio = Ratio.of(times, name, "tenzoo dense")
        rows.append([name, f"{parameters[name]:,}", spread([value * 1e3 for value in row]), spread(ratio.values)])
    header = (f"batch of {len(batch[0])}, median of {rounds} rounds", "parameters", "ms/step", "/ tenzoo dense")
    return (header, rows), skipped
