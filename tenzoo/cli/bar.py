"""The progress bar: one line that fits the terminal, and below it speed, memory and metrics."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress import rich_progress
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import RenderableType
from rich.progress import ProgressColumn, TextColumn
from rich.text import Text
from typing_extensions import override

from tenzoo.messages import elided
from tenzoo.training import batch_items

_REFRESH_RATE = 25
"""Updates of the bar a second."""

_SECONDS = 0.2
"""Between two looks at metrics and memory: a metric on a device makes the step wait for it."""


class TrainingBar(RichProgressBar):
    """Lightning's bar, with samples a second and the memory of the GPU.

    Where the output is no terminal the last frame is printed once. The evaluation after a fit leaves none.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=_REFRESH_RATE, leave=False)
        self._details: list[str] = []
        self._trained = False
        self._items = 0.0
        self._batches = 0
        self._spent = 0.0
        """Seconds of training in this epoch, without validations."""
        self._since = self._looked = 0.0

    # --- what is shown -----------------------------------------------------------------------------------------

    @override
    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        return [
            TextColumn("{task.description}"),
            rich_progress.CustomBarColumn(
                bar_width=None,
                complete_style=self.theme.progress_bar,
                finished_style=self.theme.progress_bar_finished,
                pulse_style=self.theme.progress_bar_pulse,
            ),
            rich_progress.BatchesProcessedColumn(style=self.theme.batch_progress),
            rich_progress.CustomTimeColumn(style=self.theme.time),
        ]

    @override
    def _init_progress(self, trainer: Trainer) -> None:
        before = self.progress
        super()._init_progress(trainer)
        if self.progress is not None and self.progress is not before:
            self._details = []
            self.progress.expand = True
            self.progress.columns = self.progress.columns[:-1]  # metrics have lines of their own
            self.progress.get_renderables = self._lines  # type: ignore[method-assign]

    def _lines(self) -> Iterable[RenderableType]:
        assert self.progress is not None
        assert self._console is not None
        yield self.progress.make_tasks_table(self.progress.tasks)
        if self.trainer.state.fn == TrainerFn.FITTING:
            for line in packed(self._details, self._console.width):
                yield Text(line, no_wrap=True, overflow="crop")

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        return f"Epoch {current_epoch}" if last is None or last < 0 else f"Epoch {current_epoch}/{last - 1}"

    @override
    def _update_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_disabled:
            return
        metrics = self.get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the last line names the whole folder
        shown = (
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
        )
        self._details = [*self._speed(trainer), *_memory(trainer), *shown]

    def _speed(self, trainer: Trainer) -> Iterator[str]:
        seconds = self._spent + (time.monotonic() - self._since if trainer.training else 0.0)
        if self._batches and seconds > 0:
            yield f"{self._batches / seconds:,.1f} batches/s"
            yield f"{self._items * trainer.world_size / seconds:,.0f} samples/s"

    # --- hooks -------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._items, self._batches, self._spent = 0.0, 0, 0.0
        self._since = time.monotonic()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_disabled:
            return
        if self.train_progress_bar_id is None:  # a run that goes on within an epoch
            self._initialize_train_progress_bar_id()
            self._begin_epoch()
        else:
            self._items += batch_items(pl_module, batch)
            self._batches += 1
        now = time.monotonic()
        if now - self._looked > _SECONDS:
            self._looked = now
            self._update_metrics(trainer, pl_module)
        self._update(self.train_progress_bar_id, batch_idx + 1)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._spent += time.monotonic() - self._since
        super().on_validation_start(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._since = time.monotonic()

    @override
    def _stop_progress(self) -> None:
        if self.progress is not None:
            self.progress.live.transient = self._trained and self.trainer.state.fn != TrainerFn.FITTING
        super()._stop_progress()


def _memory(trainer: Trainer) -> Iterator[str]:
    """What torch holds of the GPU's memory; it keeps the count on the host."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        yield f"GPU {torch.cuda.memory_reserved(device) / 2**30:.1f} GiB"


def packed(words: Sequence[str], width: int) -> list[str]:
    """Words in as few lines as they need, none of them split; one wider than a line loses its middle.

    Example:
        >>> packed(["val/r2 0.7", "train/loss 1.5", "a_name_that_is_long 1"], 16)
        ['val/r2 0.7', 'train/loss 1.5', 'a_name_t…_long 1']
        >>> packed(["a 1", "b 2"], 16)
        ['a 1  b 2']
    """
    lines: list[str] = []
    for word in (elided(word, width) for word in words):
        if lines and len(lines[-1]) + 2 + len(word) <= width:
            lines[-1] += f"  {word}"
        else:
            lines.append(word)
    return lines
