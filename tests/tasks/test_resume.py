"""A run that died and was resumed ends where it would have ended."""

import random

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor, Rebalance
from tenzoo.data import CompletionDataModule
from tenzoo.layers import TensorizedConv2d
from tenzoo.tasks import SAM, CompletionTask, ImageClassificationTask
from tests.data.small_cifar10 import make
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


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, method):
    whole = run(tmp_path / "whole", method)
    for step in {3, random.Random(method).randrange(1, 14)}:
        with pytest.raises(OSError, match="went away"):
            run(tmp_path / f"broken{step}", method, crash=step)
        resumed = run(tmp_path / f"broken{step}", method, resume=tmp_path / f"broken{step}" / f"step={step}.ckpt")
        assert_same_weights(whole, resumed)


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_an_epoch_whose_last_batch_was_saved_is_counted_once(tmp_path):
    """Saved before the epoch's counters go on; resumed from twice."""

    def run(path, *, crash=None, resume=None):
        torch.manual_seed(3)
        task = CompletionTask("tucker", 3, optimizer=adam())
        data = CompletionDataModule("il2", observed_fraction=0.5, batch_size=500, seed=1)  # 5 steps an epoch
        saver = ModelCheckpoint(path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        fit = trainer(
            max_epochs=6, enable_checkpointing=True, callbacks=[saver, *([] if crash is None else [Crash(crash)])]
        )
        fit.fit(task, data, ckpt_path=resume)
        return fit.global_step, task

    steps, whole = run(tmp_path / "whole")
    resume = None
    for crash in (12, 17, 23):
        with pytest.raises(OSError, match="went away"):
            run(tmp_path / "broken", crash=crash, resume=resume)
        resume = tmp_path / "broken" / f"step={crash // 5 * 5}.ckpt"
    resumed_steps, resumed = run(tmp_path / "broken", resume=resume)
    assert steps == resumed_steps == 30
    assert_same_weights(whole, resumed)


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_a_checkpoint_of_before_goes_on_as_well(tmp_path):
    """Without what is added to Lightning's checkpoints, their counters tell the place."""
    whole = run(tmp_path, "adam")
    for step in (2, 3, 6):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        del checkpoint["tenzoo_resume"]
        torch.save(checkpoint, tmp_path / "before.ckpt")
        assert_same_weights(whole, run(tmp_path / "on", "adam", resume=tmp_path / "before.ckpt"))


def run_images(path, folder, method, *, crash=None, resume=None):
    arguments, callbacks = METHODS[method]
    torch.manual_seed(3)
    network = nn.Sequential(
        TensorizedConv2d(3, 8, 3, stride=4, factorization="tr", rank=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )
    task = ImageClassificationTask(
        network,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
        lr_scheduler="one_cycle",
        label_smoothing=0.1,
        **arguments,
    )
    data = make(folder, noise=0.4)  # 6 batches an epoch
    saver = ModelCheckpoint(path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    extra = [] if crash is None else [Crash(crash)]
    fit = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saver, NormDynamicsMonitor(), *callbacks, *extra])
    fit.fit(task, data, ckpt_path=resume)
    return task


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_classification_sees_the_same_images(tmp_path, root, method):
    """Augmentation, noise, order, schedule and running statistics go on as if nothing had happened."""
    whole = run_images(tmp_path / "whole", root, method)
    for step in (4, 6, 9):  # in an epoch, between two, in the last one
        with pytest.raises(OSError, match="went away"):
            run_images(tmp_path / f"broken{step}", root, method, crash=step)
        at = tmp_path / f"broken{step}" / f"step={step}.ckpt"
        torch.manual_seed(3)
        assert_same_weights(whole, run_images(tmp_path / f"broken{step}", root, method, resume=at))
