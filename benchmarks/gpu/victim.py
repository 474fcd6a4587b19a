"""``python -m benchmarks.gpu.victim FOLDER DEVICE METHOD``: a run that kills itself without notice."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from benchmarks.gpu.jobs import KILLED_AFTER, train
from benchmarks.gpu.run import Place


class _Killed(Callback):
    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    folder, device, method = sys.argv[1:]
    train(Place(torch.device(device)), method, Path(folder), _Killed())
