"""Runs of several processes, and runs that are cut off."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from benchmarks.gpu.fits import METHODS, RandomImages, classification, deterministic, differing, fit, trainer_of
from benchmarks.gpu.run import Finding, Place
from benchmarks.loops import quiet

STEPS, KILLED_AFTER, SAVED_EVERY = 8, 5, 3


def _images() -> RandomImages:
    return RandomImages(64, 8, batch_size=8)


def ddp(place: Place) -> Iterator[Finding]:
    """DDP over NCCL with the one process that a single card takes, against training without it."""
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    try:
        for method, (sam, callbacks) in METHODS.items():
            strategy = DDPStrategy(process_group_backend=backend)
            with deterministic():
                alone = fit(place, classification(sam=sam), _images(), STEPS, callbacks())
                together = fit(place, classification(sam=sam), _images(), STEPS, callbacks(), strategy=strategy)
            wrong, count = differing(alone, together)
            yield Finding(
                f"DDP over {backend}, one process, {method}", f"{wrong} of {count} tensors differ", "0", wrong == 0
            )
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def kill_and_resume(place: Place) -> Iterator[Finding]:
    """A run that was killed without notice and resumed ends where one that was left alone does."""
    for method in ("SGD", "SAM"):
        with tempfile.TemporaryDirectory() as folder:
            whole = train(place, method, Path(folder, "whole"))
            command = [sys.executable, "-m", "benchmarks.gpu.victim", folder, place.device.type, method]
            threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            code = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=threads)
            last = Path(folder, "last.ckpt")
            if code.returncode != -9 or not last.exists():
                raise RuntimeError(f"the victim ended with {code.returncode}: {code.stderr[-200:]}")
            resumed = train(place, method, Path(folder), ckpt_path=last)
        wrong, count = differing(whole, resumed)
        yield Finding(
            f"killed after {KILLED_AFTER} of {STEPS} steps and resumed, {method}",
            f"{wrong} of {count} tensors differ",
            "0",
            wrong == 0,
        )


def train(place: Place, method: str, folder: Path, *callbacks: Any, ckpt_path: Path | None = None) -> torch.nn.Module:
    """A short run that keeps a checkpoint of every third step."""
    sam, others = METHODS[method]
    save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=SAVED_EVERY, save_top_k=0, monitor=None)
    task = classification(sam=sam)
    with quiet(), deterministic():
        trainer = trainer_of(place, STEPS, [*others(), save, *callbacks], enable_checkpointing=True)
        trainer.fit(task, _images(), ckpt_path=ckpt_path, weights_only=True)
    return task
