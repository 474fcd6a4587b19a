"""The same training plainly, with DAS and with SAM, under Lightning and in turns."""

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from benchmarks.loops import FitLoop, Loop, TakeTurns, interleave, quiet
from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.tasks import SAM, Task
from tenzoo.training import NoProfiler


def methods_in_turns(
    name: str,
    make: Callable[[SAM | None], Task],
    batch: Any,
    rounds: int,
    *,
    alpha: float,
    rho: float,
    steps: int = 2,
    warmup: int = 2,
    accelerator: str = "cpu",
) -> dict[str, list[float]]:
    """Train a task plainly, with DAS and with SAM, in turns.

    Args:
        name: Of what is trained.
        make: Makes the task, with or without SAM.
        batch: The batch of each step.
        rounds: How often each has its turn.
        alpha: Of DAS.
        rho: Of SAM.
        steps: In a turn.
        warmup: Steps before the first turn.
        accelerator: As the Trainer takes it.

    Returns:
        Seconds per step of ``"{name}, Lightning"``, ``"{name}, DAS"`` and ``"{name}, SAM"``.
    """

    def fit(*callbacks: Callback, sam: SAM | None = None) -> FitLoop:
        batches: Any = [batch] * (warmup + rounds * steps)
        data: DataLoader[Any] = DataLoader(batches, batch_size=None)
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            max_epochs=1,
            callbacks=[TakeTurns(warmup, steps), *callbacks],
            profiler=NoProfiler(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        return FitLoop(functools.partial(trainer.fit, make(sam), data))

    with quiet():
        loops: dict[str, Loop] = {
            f"{name}, Lightning": fit(),
            f"{name}, DAS": fit(DeviationAwareScaling(alpha)),
            f"{name}, SAM": fit(sam=SAM(rho)),
        }
        return interleave(loops, rounds)
