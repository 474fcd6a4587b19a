"""Slurm jobs that are requeued, and the checkpoints from which they continue."""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from typing_extensions import override


def slurm_job() -> str | None:
    """The id of this Slurm job, with its task in an array; None outside of Slurm. A requeued job keeps it."""
    if not SLURMEnvironment.detect():
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ.get("SLURM_JOB_ID", "") if array is None or task is None else f"{array}_{task}"
    return job if re.fullmatch("[0-9_-]+", job) else None


def requeue() -> str:
    """Ask Slurm to start this job again. Returns a message with the result."""
    job = slurm_job()
    if job is None:
        return "the job was not requeued, since it has no SLURM_JOB_ID"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} was not requeued: {error}"
    return f"job {job} is requeued" if done.returncode == 0 else f"job {job} was not requeued: {done.stderr.strip()}"


class _OwnCheckpoints(_CheckpointConnector):
    """Loads only the checkpoint that the Trainer is given."""

    @property
    @override
    def _hpc_resume_path(self) -> str | None:
        return None


def load_no_foreign_checkpoint(trainer: Trainer) -> None:
    """Let a Trainer that is given no checkpoint load none.

    In a Slurm job Lightning takes any ``hpc_ckpt_N.ckpt`` in the folder, of any run. It would continue from there, and
    evaluate those weights instead of the ones that were just trained.
    """
    if type(trainer._checkpoint_connector) is _CheckpointConnector:
        trainer._checkpoint_connector.__class__ = _OwnCheckpoints


def check_same_job(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that Lightning found in the folder of a Slurm job, if another job wrote it.

    Args:
        trainer: The Trainer, about to resume.
        saved: The part of the checkpoint that :class:`~tenzoo.jobs.ExactResume` wrote.

    Raises:
        ValueError: With both jobs.
    """
    path, job = trainer.ckpt_path, slurm_job()
    if job is None or path is None or not re.fullmatch(r"hpc_ckpt_\d+\.ckpt", Path(path).name):
        return
    if saved.get("job") != job:
        raise ValueError(
            f"expected a checkpoint of this Slurm job, {job}, got {str(path)!r} of job {saved.get('job')}, which "
            "Lightning takes without a `ckpt_path`; move it away, or rename it and give it as `ckpt_path`"
        )
