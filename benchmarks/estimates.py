"""How well the estimates behind ``implementation="auto"`` agree with measured times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from benchmarks.report import Table
from benchmarks.steps import Step, forward_step, in_turns, layer_step
from tenzoo.layers import Implementation, TensorizedConv2d, TensorizedLayer, TensorizedLinear

_WAYS: tuple[Implementation, ...] = ("reconstruct", "contract")


@dataclass(frozen=True)
class Case:
    """A layer and the number of its inputs.

    Args:
        sizes: Input and output channels, or features.
        side: Of the images that a convolution of 3 × 3 sees; 0 for a linear layer.
        batch: Images or rows.
        format: Of the weight.
        rank: As the layer takes it.
    """

    sizes: tuple[int, int]
    side: int
    batch: int
    format: str
    rank: int | float

    @property
    def name(self) -> str:
        """All of it in short."""
        kind, inputs = ("conv", f"{self.batch} × {self.side} × {self.side}") if self.side else ("linear", self.batch)
        return f"{kind} {self.sizes[0]}→{self.sizes[1]} on {inputs}, {self.format} {self.rank:g}"

    def layer(self, implementation: Implementation) -> TensorizedLayer:
        """The layer."""
        torch.manual_seed(0)
        if self.side:
            layer = TensorizedConv2d(
                *self.sizes, 3, padding=1, factorization=self.format, rank=self.rank, implementation=implementation
            )
            return layer.to(memory_format=torch.channels_last)
        return TensorizedLinear(*self.sizes, factorization=self.format, rank=self.rank, implementation=implementation)

    def input(self) -> Tensor:
        """An input for it."""
        if not self.side:
            return torch.randn(self.batch, self.sizes[0])
        images = torch.randn(self.batch, self.sizes[0], self.side, self.side)
        return images.contiguous(memory_format=torch.channels_last)


CASES = (
    *(Case((16, 16), 32, 16, *kind) for kind in (("tr", 10), ("tt", 16), ("tucker", 16), ("cp", 50), ("btt", 12))),
    *(Case((32, 32), 16, 32, *kind) for kind in (("tt", 16), ("tucker", 16), ("cp", 50))),
    *(Case((64, 64), 8, 32, *kind) for kind in (("tr", 10), ("tt", 16), ("tucker", 16), ("cp", 50), ("btt", 12))),
    *(Case((64, 64), 8, 128, *kind) for kind in (("tr", 10), ("tt", 16))),
    *(Case((256, 256), 14, 4, name, 1 / 8) for name in ("cp", "tucker", "tt", "tr")),
    *(Case((1024, 1024), 0, 64, name, 1 / 8) for name in ("cp", "tucker", "tt", "tr")),
    *(Case((1024, 1024), 0, 64, name, 1 / 64) for name in ("tt", "btt")),
    *(Case((256, 256), 0, 2048, name, 1 / 2) for name in ("cp", "tucker", "tt")),
    *(Case((256, 256), 0, 2048, name, 16) for name in ("tt", "tr")),
)


def agreement(rounds: int, cases: Sequence[Case] = CASES, *, training: bool = True) -> list[Table]:
    """Estimated and measured time of reconstructing, divided by that of contracting.

    Args:
        rounds: How often each implementation of each layer has its turn.
        cases: The layers.
        training: With a backward pass; otherwise without, and with a reconstructed weight that is kept between calls.
    """
    steps: dict[str, Step] = {}
    estimated: dict[str, float] = {}
    for case in cases:
        x = case.input()
        for way in _WAYS:
            layer = case.layer(way)
            steps[f"{case.name}, {way}"] = layer_step(layer, x) if training else forward_step(layer, x)
        seconds = layer.costs.seconds(layer.positions(x), "training" if training else "cached", "cpu")
        estimated[case.name] = seconds["reconstruct"] / seconds["contract"]
    times = in_turns(steps, rounds, steps_per_turn=2 if training else 20)
    measured = {name: _measured(times, name) for name in estimated}
    phase = "training" if training else "inference"
    return [_summary(estimated, measured), _details(estimated, measured, phase)]


def _measured(times: Mapping[str, Sequence[float]], name: str) -> float:
    pairs = zip(*(times[f"{name}, {way}"] for way in _WAYS), strict=True)
    return float(median(reconstructed / contracted for reconstructed, contracted in pairs))


def loss_of_pick(estimated: float, measured: float) -> float:
    """How many times longer the step takes by the way that the estimate chooses than by the faster one.

    Example:
        >>> loss_of_pick(0.5, 0.9), loss_of_pick(2.0, 0.5)
        (1.0, 2.0)
    """
    return max(1.0, 1 / measured if estimated > 1 else measured)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's coefficient, of values without ties.

    Example:
        >>> round(rank_correlation([1.0, 2.0, 30.0], [0.1, 0.2, 0.3]), 6)
        1.0
    """
    ranks = torch.tensor([first, second]).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])


def _summary(estimated: Mapping[str, float], measured: Mapping[str, float]) -> Table:
    losses = {name: loss_of_pick(estimated[name], measured[name]) for name in estimated}
    worst = max(losses, key=lambda name: losses[name])
    right = sum(loss == 1 for loss in losses.values())
    rows = [
        ["rank correlation (Spearman)", f"{rank_correlation(list(estimated.values()), list(measured.values())):.2f}"],
        ["auto takes the faster way", f"{right} of {len(losses)}"],
        [f"worst choice / faster way: {worst}", f"{losses[worst]:.2f}"],
    ]
    return (f"estimates against measurements, {len(losses)} layers", ""), rows


def _details(estimated: Mapping[str, float], measured: Mapping[str, float], phase: str) -> Table:
    rows = []
    for name, guess in sorted(estimated.items(), key=lambda item: item[1]):
        loss = loss_of_pick(guess, measured[name])
        rows.append([name, f"{guess:.2f}", f"{measured[name]:.2f}", "" if loss == 1 else f"{loss:.2f}"])
    return (f"reconstruct / contract, in {phase}", "estimated", "measured", "loss by auto"), rows
