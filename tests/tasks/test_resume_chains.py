"""A run that is stopped anywhere and resumed, again and again, ends bit for bit where an uninterrupted one ends."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor
from tenzoo.data import CompletionDataModule
from tenzoo.jobs.random_state import random_state
from tenzoo.tasks import SAM, CompletionTask
from tests.tasks.toy import adam, assert_same_weights, sgd, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")


class Noisy(CompletionTask):
    """Draws from all generators, logs an average over the epoch, and remembers its batches."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def loss(self, batch, batch_idx):
        if not self.perturbed:
            self.seen.append(batch.value.sum().item())
            self.noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
            self.log("noise", self.noise, on_step=False, on_epoch=True)
        return super().loss(batch, batch_idx) * (1 + 0.3 * self.noise)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        torch.rand(1)
        return super().validation_step(batch, batch_idx, dataloader_idx)

    @property
    def metric_names(self):
        return {*super().metric_names, "noise"}


class KeepAll(ModelCheckpoint):
    """Chooses as ever, but removes no file: the tests resume from before the end."""

    def _remove_checkpoint(self, trainer, filepath):
        pass


class SaveEverywhere(Checkpoint):
    """Writes a checkpoint at every place at which Lightning's own callbacks write one."""

    def __init__(self, folder):
        self.folder, self.names = folder, []

    def _save(self, trainer, hook):
        if trainer.sanity_checking:
            return
        self.names.append(f"{trainer.fit_loop.epoch_loop.total_batch_idx:02}-{trainer.current_epoch}-{hook}")
        trainer.save_checkpoint(self.folder / f"{self.names[-1]}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self._save(trainer, "1batch")

    def on_validation_end(self, trainer, *_):
        self._save(trainer, "2validation")

    def on_train_epoch_end(self, trainer, *_):
        self._save(trainer, "3epoch")


def plateau(metric="val/r2"):
    mode = "min" if metric == "train/loss" else "max"
    return {
        "lr_scheduler": lambda optimizer: ReduceLROnPlateau(optimizer, mode=mode, factor=0.7, patience=0),
        "lr_scheduler_monitor": metric,
    }


RUNS = {
    "adam": ({"optimizer": adam(), **plateau("noise")}, {}, []),
    "momentum": (
        {"optimizer": sgd(0.01, momentum=0.9), "accumulate_grad_batches": 3, **plateau()},
        {"val_check_interval": 2},
        [],
    ),
    "sam": (
        {
            "optimizer": adam(),
            "sam": SAM(rho=0.1),
            "accumulate_grad_batches": 2,
            "lr_scheduler": lambda optimizer: ExponentialLR(optimizer, 0.9),
            "lr_scheduler_interval": "step",
        },
        {},
        [],
    ),
    "sam on a plateau": (
        {"optimizer": sgd(0.01, momentum=0.9), "sam": SAM(rho=0.1, adaptive=True), **plateau("train/loss")},
        {"val_check_interval": 2},
        [],
    ),
    "sam on a plateau of steps": (
        {"optimizer": adam(), "sam": SAM(rho=0.1), "lr_scheduler_interval": "step", **plateau("train/loss")},
        {},
        [],
    ),
    "das": (
        {"optimizer": adam(), "accumulate_grad_batches": 2, "lr_scheduler": "one_cycle"},
        {"check_val_every_n_epoch": 2},
        [lambda: DeviationAwareScaling(0.05, alpha_schedule="cosine")],
    ),
    "max_steps": (
        {"optimizer": adam(), "accumulate_grad_batches": 2, **plateau()},
        {"max_steps": 8, "max_epochs": -1},
        [],
    ),
    "early stop": (
        {"optimizer": sgd(0.0)},
        {"max_epochs": 9},
        [lambda: EarlyStopping("val/r2", mode="max", patience=2)],
    ),
}


def run(folder, name, resume=None, *, kind=Noisy, extra=()):
    folder.mkdir(exist_ok=True)
    arguments, settings, callbacks = RUNS[name]
    torch.manual_seed(3 if resume is None else 99)
    random.seed(3 if resume is None else 99)
    np.random.seed(3 if resume is None else 99)  # noqa: NPY002
    task = kind("tucker", 2, gradient_clip_val=1.0, **arguments)
    data = CompletionDataModule("il2", observed_fraction=0.5, validation_fraction=0.1, batch_size=500, seed=1)
    everywhere = SaveEverywhere(folder)
    savers = [
        KeepAll(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}"),
        KeepAll(folder, monitor="val/r2", mode="max", save_top_k=2, filename="best-{step}"),
        KeepAll(folder, monitor="noise", save_last=True, filename="noise-{step}", save_on_train_epoch_end=True),
    ]
    fit = trainer(
        **{"max_epochs": 3, "enable_checkpointing": True, **settings},
        callbacks=[*[each() for each in callbacks], NormDynamicsMonitor(), *savers, *extra, everywhere],
    )
    fit.fit(task, data, ckpt_path=resume)
    return fit, task, everywhere


def outcome(fit, task):
    """All that a run leaves behind, file names apart."""
    ours, best, average = fit.checkpoint_callbacks[:3]
    stops = [each.state_dict() for each in fit.callbacks if isinstance(each, EarlyStopping | DeviationAwareScaling)]
    return {
        "weights": task.state_dict(),
        "optimizer": fit.optimizers[0].state_dict(),
        "schedulers": [config.scheduler.state_dict() for config in fit.lr_scheduler_configs],
        "callbacks": stops,
        "best": (best.best_model_score, best.kth_value, sorted(value.item() for value in best.best_k_models.values())),
        "average": (average.best_model_score, average._last_global_step_saved),
        "saved": ours._last_global_step_saved,
        "metrics": dict(fit.callback_metrics),
        "random": random_state(torch.device("cpu")),
        "counters": (fit.global_step, fit.current_epoch, fit.fit_loop.epoch_loop._batches_that_stepped),
    }


def assert_equal(first, second, path=""):
    if isinstance(first, torch.Tensor):
        assert first.equal(second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for index, (one, two) in enumerate(zip(first, second, strict=True)):
            assert_equal(one, two, f"{path}/{index}")
    else:
        assert first == second or (first != first and second != second), path


def assert_goes_on(whole, part, name):
    """The rest of a run is that of the whole one: its batches, its checkpoints, and where it ends."""
    assert part[1].seen == whole[1].seen[len(whole[1].seen) - len(part[1].seen) :], name
    done = whole[2].names.index(name)
    assert part[2].names == whole[2].names[done + 1 :], name
    if part[2].names:
        assert_equal(outcome(whole[0], whole[1]), outcome(part[0], part[1]), name)
    else:  # there is nothing left to do
        assert_same_weights(whole[1], part[1])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", RUNS)
def test_chains_of_resumes(tmp_path, name):
    """Each link goes on from a checkpoint that the one before wrote."""
    whole = run(tmp_path / "0", name)
    generator = random.Random(name)
    names, before = whole[2].names, tmp_path / "0"
    for link in range(4):
        place = generator.choice(names[: max(1, len(names) // 2)])
        part = run(tmp_path / f"link{link}", name, before / f"{place}.ckpt")
        assert_goes_on(whole, part, place)
        names, before = part[2].names, tmp_path / f"link{link}"
        if not names:
            break


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_place_of_a_run(tmp_path, name):
    """And from there on once more, from a place that is drawn."""
    whole = run(tmp_path / "0", name)
    generator = random.Random(name)
    for place in whole[2].names:
        part = run(tmp_path / place, name, tmp_path / "0" / f"{place}.ckpt")
        assert_goes_on(whole, part, place)
        if part[2].names:
            again = generator.choice(part[2].names)
            assert_goes_on(whole, run(tmp_path / f"{place}+", name, tmp_path / place / f"{again}.ckpt"), again)
