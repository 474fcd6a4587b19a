"""The rank and the weight decay of a completion, chosen on its validation entries."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from tenzoo.data import CompletionBatch, CompletionDataModule
from tenzoo.data.completion.loaders import EntryLoader
from tenzoo.memory import free_memory
from tenzoo.models import TensorCompletion
from tenzoo.models.completion import TRAINED_BYTES

AUTO = "auto"
"""In place of a rank."""

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Ranks that are tried, up to :data:`MOST_PARAMETERS`."""

MOST_PARAMETERS = 10
"""Parameters per training entry of the largest model that is tried."""

COUPLED = (0.0, 3e-4, 1e-3, 3e-3, 1e-2)
"""Weight decays beside a mean of squared residuals, of an optimizer that adds them to the gradient."""

DECOUPLED = (0.0, 1e-2, 1e-1, 1.0)
"""Weight decays of an optimizer such as AdamW, which multiplies them by its learning rate."""


_ALIKE = 0.01
"""Part of an error that does not matter: with a penalty, ranks above the best one have the same errors."""

_EPOCHS = 100
"""Of a run whose length in epochs is not known."""


class Choice(NamedTuple):
    """A rank, and the weight decay of the cores; None where the optimizer has none."""

    rank: int
    decay: float | None


@dataclass
class Trial:
    """A model in training.

    Args:
        choice: What it stands for.
        model: With the location and scale of the data.
        optimizer: Over its parameters.
        loss: Of a model and a batch.
        batches: Of an epoch, each time they are asked for.
        validation: All validation entries.
    """

    choice: Choice
    model: TensorCompletion
    optimizer: Optimizer
    loss: Callable[[TensorCompletion, CompletionBatch], Tensor]
    batches: EntryLoader
    validation: Sequence[CompletionBatch]
    rmse: float = field(default=math.inf)
    """The lowest on the validation entries after an epoch, in the units of the data."""

    def train(self) -> None:
        """One epoch, and a look at the validation entries."""
        self.model.train()
        for batch in self.batches:
            assert isinstance(batch, CompletionBatch)  # shares are of several processes
            self.optimizer.step(functools.partial(self._closure, batch))
        self.model.eval()
        with torch.no_grad():
            squares = [(self.model(index) - value).double().square() for index, value in self.validation]
        error = torch.cat(squares).mean().sqrt().item()
        if error < self.rmse:  # NaN is not
            self.rmse = error

    def _closure(self, batch: CompletionBatch) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()


def search(
    data: CompletionDataModule,
    make: Callable[[Choice], tuple[TensorCompletion, Optimizer]],
    loss: Callable[[TensorCompletion, CompletionBatch], Tensor],
    *,
    num_parameters: Callable[[int], int],
    decay: float | None,
    summed: bool,
    device: torch.device,
    epochs: int | None,
    minutes: float,
) -> Choice:
    """The choice with the lowest error on the validation entries, by successive halving.

    Global random numbers are as before, so that the run has those that it would have with this rank in its config.

    Args:
        data: Set up, with validation entries.
        make: A model, with the location and scale of the data, and its optimizer.
        loss: Of a model and a batch.
        num_parameters: Of a model, by its rank.
        decay: Of the cores, if it is fixed.
        summed: Whether the loss is the sum over a batch, and not the mean.
        device: Of the models.
        epochs: Of the run; None or -1 if not known.
        minutes: Most minutes.

    Raises:
        ValueError: If there are no validation entries, or no error is finite.
    """
    if "val" not in data.splits:
        raise ValueError("expected validation entries with `rank` 'auto', got none; set `validation_fraction` above 0")
    begun = time.monotonic()
    entries = len(data.splits["train"])
    validation = [CompletionBatch(*(part.to(device) for part in batch)) for batch in data.loader_of("val")]
    with torch.random.fork_rng():
        decays: Sequence[float | None] = [decay]
        if decay is None:
            _, optimizer = make(Choice(1, None))
            decays = decays_of(optimizer, scale=min(data.batch_size or entries, entries) if summed else 1)
        room = (free_memory() or math.inf) / (
            4 * TRAINED_BYTES * len(decays)
        )  # larger ranks need as much as all others
        most = min(MOST_PARAMETERS * entries, room)
        trials = [
            Trial(choice, *make(choice), loss, data.one_process_loader(device), validation)
            for choice in candidates(num_parameters, most=most, decays=decays)
        ]
        choice, rmse = halve(trials, epochs=epochs if epochs and epochs > 0 else _EPOCHS, minutes=minutes)
    decided = "" if choice.decay is None else f", core_weight_decay: {choice.decay:g}"
    rank_zero_info(
        f"rank: auto takes rank: {choice.rank}{decided} (validation RMSE {rmse:.4g}, best of {len(trials)} choices, "
        f"{time.monotonic() - begun:.0f} s)"
    )
    return choice


def candidates(num_parameters: Callable[[int], int], *, most: float, decays: Sequence[float | None]) -> list[Choice]:
    """All pairs of a rank and a weight decay, without ranks that make the same model or too large a one.

    Args:
        num_parameters: Of a model, by its rank.
        most: Parameters of the largest model. Rank 1 is tried in any case.
        decays: Weight decays.

    Example:
        >>> candidates(lambda rank: 10 * min(rank, 4), most=25, decays=[None])
        [Choice(rank=1, decay=None), Choice(rank=2, decay=None)]
    """
    sizes: dict[int, int] = {}
    for rank in RANKS:
        size = num_parameters(rank)
        if not sizes or size <= most:
            sizes.setdefault(size, rank)
    return [Choice(rank, decay) for rank in sizes.values() for decay in decays]


def decays_of(optimizer: Optimizer, *, scale: float) -> Sequence[float | None]:
    """The weight decays to try with an optimizer, its own among them.

    Args:
        optimizer: Made with the user's arguments.
        scale: How many squared residuals the loss adds up; 1 for their mean.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> decays_of(torch.optim.AdamW([weight], weight_decay=0.3), scale=1)
        [0.0, 0.01, 0.1, 0.3, 1.0]
        >>> decays_of(torch.optim.Rprop([weight]), scale=1)
        [None]
    """
    settings = optimizer.param_groups[0]
    if "weight_decay" not in settings:
        return [None]
    decoupled = settings.get("decoupled_weight_decay", False)
    tried = DECOUPLED if decoupled else tuple(scale * decay for decay in COUPLED)
    return sorted({*tried, float(settings["weight_decay"])})


def halve(trials: Sequence[Trial], *, epochs: int, minutes: float) -> tuple[Choice, float]:
    """Train all for a few epochs, the better half for twice as many, and so on until two are left.

    After ``minutes``, the best of those that were trained longest is taken, and a warning says so: the choice then
    depends on how fast the machine is. Source: Karnin, Koren and Somekh 2013, "Almost optimal exploration in
    multi-armed bandits", sequential halving.

    Args:
        trials: One or more.
        epochs: Of the run that the choice is for. The last two are trained for about as many.
        minutes: Of all of them.

    Returns:
        The choice with the lowest error, or the smallest rank with nearly the same, and its error.

    Raises:
        ValueError: If no error is finite.
    """
    started = time.monotonic()
    alive = list(trials)
    length = max(1, round(epochs / len(trials)))
    while True:
        for number, trial in enumerate(alive):
            for _ in range(length):
                trial.train()
            if time.monotonic() - started > 60 * minutes and len(alive) > 2:
                rank_zero_warn(
                    f"rank: auto stopped after {minutes:g} minutes, with {len(alive)} of {len(trials)} choices left; "
                    "give more `search_minutes` for a choice that does not depend on the machine"
                )
                alive = alive[: number + 1]
                break
        alive.sort(key=lambda trial: trial.rmse)
        if not math.isfinite(alive[0].rmse):
            raise ValueError(
                "expected finite errors with `rank` 'auto', got none: training diverges; lower the learning rate"
            )
        if len(alive) <= 2 or time.monotonic() - started > 60 * minutes:
            alike = [trial for trial in trials if trial.rmse <= alive[0].rmse * (1 + _ALIKE)]
            least = min(alike, key=lambda trial: (trial.choice.rank, trial.rmse))
            return least.choice, least.rmse
        alive = alive[: math.ceil(len(alive) / 2)]
        length *= 2


def choice_of(checkpoint: Mapping[str, Any]) -> Choice:
    """What a checkpoint was trained with.

    Raises:
        ValueError: If it does not say.
    """
    settings = checkpoint.get("hyper_parameters", {})
    rank = settings.get("rank", AUTO)
    if rank == AUTO:
        raise ValueError("expected a checkpoint with a rank for `rank` 'auto', got one without")
    return Choice(rank, settings.get("core_weight_decay"))


def check_minutes(minutes: Any) -> float:
    """The minutes of a search.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not above 0.

    Example:
        >>> check_minutes(5)
        5.0
    """
    if not isinstance(minutes, int | float) or isinstance(minutes, bool):
        raise TypeError(f"expected a number in `search_minutes`, got {minutes!r}")
    if not 0 < minutes < math.inf:
        raise ValueError(f"expected a number above 0 in `search_minutes`, got {minutes}")
    return float(minutes)
