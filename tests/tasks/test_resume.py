"""A run that died and was resumed ends where it would have ended."""

import random

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor, Rebalance
from tenzoo.data import CompletionDataModule
from tenzoo.tasks import SAM, CompletionTask
from tests.tasks.toy import adam, assert_same_weights, trainer

METHODS = {
    "adam": ({}, []),
    "sam": ({"sam": SAM(rho=0.1)}, []),
    "das": ({}, [DeviationAwareScaling(0.05, alpha_schedule="cosine"), Rebalance()]),
}


class Crash(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise OSError("the machine went away")


def run(path, method, *, crash=None, resume=None):
    arguments, callbacks = METHODS[method]
    torch.manual_seed(3)
    task = CompletionTask(
        "tucker",
        3,
        optimizer=adam(),
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        lr_scheduler_interval="step",
        **arguments,
    )
    data = CompletionDataModule("il2", observed_fraction=0.5, batch_size=500, seed=1)  # 5 batches, 3 steps an epoch
    saver = ModelCheckpoint(path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    extra = [] if crash is None else [Crash(crash)]
    fit = trainer(max_epochs=5, enable_checkpointing=True, callbacks=[saver, NormDynamicsMonitor(), *callbacks, *extra])
    fit.fit(task, data, ckpt_path=resume)
    return task


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, method):
    whole = run(tmp_path / "whole", method)
    for step in {3, random.Random(method).randrange(1, 14)}:
        with pytest.raises(OSError, match="went away"):
            run(tmp_path / f"broken{step}", method, crash=step)
        resumed = run(tmp_path / f"broken{step}", method, resume=tmp_path / f"broken{step}" / f"step={step}.ckpt")
        assert_same_weights(whole, resumed)
