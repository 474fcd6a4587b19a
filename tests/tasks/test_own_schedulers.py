"""Schedulers and hooks of a task's own configure_optimizers(), with and without SAM."""

from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.data import CompletionDataModule
from tenzoo.tasks import SAM, CompletionTask
from tests.tasks.toy import Batches, Regression, adam, sgd, trainer


class Own(Regression):
    """Configures its optimizer itself."""

    def __init__(self, settings, **kwargs):
        super().__init__(**kwargs)
        self.settings = settings

    def configure_optimizers(self):
        return self.settings(torch.optim.SGD(self.parameters(), lr=0.01))


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_end(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def one_cycle(optimizer):
    return {"scheduler": OneCycleLR(optimizer, 0.01, total_steps=21), "interval": "step"}


def every_second(optimizer):
    return {"scheduler": StepLR(optimizer, 1, gamma=0.5), "frequency": 2}


def every_second_step(optimizer):
    return {"scheduler": StepLR(optimizer, 1, gamma=0.5), "interval": "step", "frequency": 2}


def plateau(optimizer):
    return {"scheduler": ReduceLROnPlateau(optimizer, patience=0, threshold=10.0), "monitor": "train/loss_epoch"}


SETTINGS = {
    "steps": lambda o: {"optimizer": o, "lr_scheduler": one_cycle(o)},
    "frequency": lambda o: ([o], [every_second(o)]),
    "frequency of steps": lambda o: [{"optimizer": o, "lr_scheduler": every_second_step(o)}],
    "plateau": lambda o: {"optimizer": o, "lr_scheduler": plateau(o)},
    "alone": lambda o: ([o], [StepLR(o, 1, gamma=0.5)]),
}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS)
def test_own_schedulers_step_under_sam_as_without(settings, accumulated):
    found = []
    for sam in (None, SAM(rho=0.0)):
        torch.manual_seed(0)
        rates = Rates()
        task = Own(SETTINGS[settings], sam=sam, accumulate_grad_batches=accumulated)
        trainer(callbacks=[rates]).fit(task, Batches(), Batches(seed=9))
        found.append((rates.rates, task.inner.weight.detach().clone()))
    assert found[0][0] == found[1][0]
    assert len(set(found[0][0])) > 1
    assert found[0][1].equal(found[1][1])


def test_a_plateau_without_a_metric_is_refused_before_training():
    task = Own(lambda o: ([o], [{"scheduler": ReduceLROnPlateau(o)}]), sam=SAM())
    with pytest.raises(ValueError, match="as `monitor` of ReduceLROnPlateau, got none"):
        trainer().fit(task, Batches(), Batches())


class Called(Callback):
    def __init__(self):
        self.calls = Counter()
        self.gradients = []

    def on_before_zero_grad(self, *_):
        self.calls["zero"] += 1

    def on_before_backward(self, *_):
        self.calls["before"] += 1

    def on_after_backward(self, trainer, module):
        self.calls["after"] += 1
        self.gradients.append(module.inner.weight.grad.clone())


class Hooked(Regression):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = Counter()

    def on_before_zero_grad(self, optimizer):
        self.calls["zero"] += 1

    def on_before_backward(self, loss):
        self.calls["before"] += 1

    def on_after_backward(self):
        self.calls["after"] += 1


@pytest.mark.parametrize("accumulated", [1, 2])
def test_hooks_around_a_step_are_called_under_sam_as_without(accumulated):
    calls, gradients = [], []
    for sam in (None, SAM(rho=0.0)):
        torch.manual_seed(0)
        called, task = Called(), Hooked(optimizer=sgd(), sam=sam, accumulate_grad_batches=accumulated)
        trainer(callbacks=[called], max_epochs=2).fit(task, Batches(), Batches())
        calls += [called.calls, task.calls]
        gradients.append(called.gradients)
    assert calls[0] == {"zero": 8 // accumulated, "before": 8, "after": 8}
    assert calls[0] == calls[1] == calls[2] == calls[3]
    for plain, own in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, own)


@pytest.mark.parametrize("method", [{"lr_scheduler": "cosine"}, {"lr_scheduler": "one_cycle"}, {}])
def test_a_schedule_over_the_run_beside_an_accumulation_that_changes_it_is_refused(method):
    callbacks = [GradientAccumulationScheduler({0: 2})]
    if not method:
        callbacks.append(DeviationAwareScaling(0.01, alpha_schedule="linear"))
    with pytest.raises(ValueError, match=r"no GradientAccumulationScheduler with `(lr_scheduler|alpha_schedule)` '"):
        trainer(callbacks=callbacks).fit(Regression(optimizer=adam(), **method), Batches(), Batches())


@pytest.mark.parametrize("sam", [None, SAM()], ids=["plain", "sam"])
@pytest.mark.parametrize(
    ("arguments", "flags", "reason"),
    [
        ({}, {"check_val_every_n_epoch": 2}, "in each epoch, with a validation in every 2th"),
        ({}, {"limit_val_batches": 0}, "without validation"),
        ({"lr_scheduler_interval": "step"}, {}, "after each step, before the first validation"),
    ],
)
def test_a_plateau_of_a_metric_that_is_not_there_yet_is_refused(arguments, flags, reason, sam):
    def plateau(optimizer):
        return ReduceLROnPlateau(optimizer)

    task = CompletionTask(
        "cp", 2, optimizer=adam(), sam=sam, lr_scheduler=plateau, lr_scheduler_monitor="val/rmse", **arguments
    )
    data = CompletionDataModule("il2", observed_fraction=0.5)
    with pytest.raises(ValueError, match=f"ReduceLROnPlateau that asks {reason}.* got 'val/rmse'"):
        trainer(**flags).fit(task, data)


@pytest.mark.parametrize("setting", [{"lr_scheduler_interval": "step"}, {"lr_scheduler_monitor": "val/loss"}])
def test_settings_of_no_scheduler_are_refused(setting):
    with pytest.raises(
        ValueError, match="`lr_scheduler` with `lr_scheduler_interval` and `lr_scheduler_monitor`, got none"
    ):
        trainer().fit(Regression(optimizer=adam(), **setting), Batches(), Batches())


def test_an_algorithm_of_no_clipping_is_refused():
    with pytest.raises(ValueError, match="`gradient_clip_val` with `gradient_clip_algorithm` 'value', got none"):
        Regression(optimizer=adam(), gradient_clip_algorithm="value")
