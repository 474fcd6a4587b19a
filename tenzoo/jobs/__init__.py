"""What makes a run safe: checkpoints that are whole, resuming that is exact, and signals that wait for a step's end."""

from tenzoo.jobs.checkpoint_io import AtomicCheckpointIO, CheckpointWriteError, write_atomically
from tenzoo.jobs.resume import ExactResume

__all__ = ["AtomicCheckpointIO", "CheckpointWriteError", "ExactResume", "write_atomically"]
