"""What the command line does for jobs on a cluster."""

import sys
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from tenzoo.distributed import is_first_process
from tenzoo.jobs import handle_signals, load_no_foreign_checkpoint, slurm_job


def prepare(trainer: Trainer, root: str) -> None:
    """Make a new Trainer fit for a cluster.

    Args:
        trainer: Just made.
        root: Of all runs; a requeued job finds there where it goes on.

    Raises:
        ValueError: For a strategy whose processes keep their results.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            "expected 'ddp' in `trainer.strategy`, got one that spawns or forks processes, from which neither metrics "
            "nor predictions come back; ddp starts the same number of processes"
        )
    load_no_foreign_checkpoint(trainer)
    handle_signals(trainer, pointer=_pointer(root))


def where_it_goes_on(root: str) -> str | None:
    """The checkpoint of this very Slurm job, if it was requeued."""
    pointer = _pointer(root)
    if pointer is None or not pointer.is_file():
        return None
    path = pointer.read_text()
    if is_first_process():
        print(f"tenzoo: job {slurm_job()} was requeued and goes on from {path}", file=sys.stderr)
    return path


def forget(trainer: Trainer, root: str) -> None:
    """Let a job that is done begin anew if it is started again."""
    pointer = _pointer(root)
    if pointer is not None and trainer.is_global_zero:
        pointer.unlink(missing_ok=True)


def _pointer(root: str) -> Path | None:
    job = slurm_job()
    return None if job is None else Path(root) / f"slurm-{job}.resume"
