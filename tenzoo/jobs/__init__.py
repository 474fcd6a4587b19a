"""Safe runs: whole checkpoints, exact resuming, and signals that wait for the end of a batch."""

from lightning.pytorch import Callback, Trainer

from tenzoo.jobs.checkpoint_io import AtomicCheckpointIO, CheckpointWriteError, write_atomically
from tenzoo.jobs.last_state import SaveLastState
from tenzoo.jobs.resume import ExactResume, first_logged_step
from tenzoo.jobs.signals import Preempted, Signals, StopOnSignal, handle_signals
from tenzoo.jobs.slurm import load_no_foreign_checkpoint, slurm_job
from tenzoo.jobs.world import check_world_size

__all__ = [
    "AtomicCheckpointIO",
    "CheckpointWriteError",
    "ExactResume",
    "Preempted",
    "SaveLastState",
    "Signals",
    "StopOnSignal",
    "first_logged_step",
    "handle_signals",
    "load_no_foreign_checkpoint",
    "secure",
    "slurm_job",
]


def secure(trainer: Trainer) -> list[Callback]:
    """Make the runs of a Trainer safe, before one starts.

    Returns:
        The callbacks to attach, without those that are attached already.

    Raises:
        ValueError: If the number of processes in the Trainer is not the number that was started.
    """
    check_world_size(trainer)
    write_atomically(trainer)
    handle_signals(trainer)
    load_no_foreign_checkpoint(trainer)
    attached = {type(each) for each in trainer.callbacks}  # type: ignore[attr-defined]  # by an earlier run
    return [kind() for kind in (ExactResume, SaveLastState, StopOnSignal) if kind not in attached]
