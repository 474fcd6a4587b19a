"""Large tensors of which a million entries are known, and the ways to train on them."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.optim import Optimizer

from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.data import CompletionDataModule
from tenzoo.tasks import CompletionTask
from tenzoo.training import NoProfiler


@dataclass(frozen=True)
class Problem:
    """A tensor of which some entries are known."""

    shape: tuple[int, ...]
    num_entries: int = 1_000_000
    batch_size: int = 65_536

    @property
    def name(self) -> str:
        """The shape, in short."""
        return "×".join(f"10^{len(str(size)) - 1}" if str(size).strip("0") == "1" else str(size) for size in self.shape)

    @property
    def steps(self) -> int:
        """Batches in which each entry comes once, the last of them smaller."""
        return -(-self.num_entries // self.batch_size)

    def data(self, steps: int) -> CompletionDataModule:
        """All entries for training, in one epoch of this many steps."""
        return CompletionDataModule(
            "synthetic",
            shape=self.shape,
            num_entries=self.num_entries,
            observed_fraction=1.0,
            validation_fraction=0.0,
            batch_size=self.batch_size,
            steps_per_epoch=steps,
        )


PROBLEMS = (
    Problem((10_000, 10_000, 100)),
    Problem((100_000, 100_000, 1_000)),
    Problem((1_000_000, 1_000_000, 10_000)),
)

METHODS: dict[str, tuple[Callable[[Iterable[nn.Parameter]], Optimizer], bool]] = {
    "SGD": (functools.partial(torch.optim.SGD, lr=0.1), False),
    "SGD + DAS": (functools.partial(torch.optim.SGD, lr=0.1), True),
    "SparseAdam": (functools.partial(torch.optim.SparseAdam, lr=0.02), False),
    "dense Adam": (functools.partial(torch.optim.Adam, lr=0.02), False),
}
"""For each method its optimizer, and whether DAS acts beside it."""


def train(problem: Problem, method: str, data: CompletionDataModule, *callbacks: Callback) -> None:
    """One epoch under Lightning, without loggers."""
    optimizer, scales = METHODS[method]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[*callbacks, *([DeviationAwareScaling(0.001)] if scales else [])],
        profiler=NoProfiler(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    torch.manual_seed(0)
    trainer.fit(CompletionTask("cp", 8, shape=problem.shape, optimizer=optimizer), data)
