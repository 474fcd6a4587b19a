"""Hooks of a user's task, written as for any LightningModule: nothing that a task does is lost."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.tasks import SAM
from tests.tasks.toy import Batches, Regression, assert_same_weights, sgd, trainer

SEEN = pytest.mark.parametrize("sam", [None, SAM(rho=0.05)], ids=["plain", "sam"])


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9, factor=0.5)


SETTINGS = {
    "setup": {"accumulate_grad_batches": 3},
    "teardown": {"accumulate_grad_batches": 3},
    "on_fit_start": {"lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1), "lr_scheduler_interval": "step"},
    "on_before_optimizer_step": {"gradient_clip_val": 0.1},
    "on_train_batch_start": {
        "lr_scheduler": plateau,
        "lr_scheduler_interval": "step",
        "lr_scheduler_monitor": "train/mse",
    },
    "on_train_epoch_start": {"lr_scheduler": plateau, "lr_scheduler_monitor": "train/loss"},
    "on_train_epoch_end": {"lr_scheduler": plateau, "lr_scheduler_monitor": "train/loss"},
    "on_save_checkpoint": {},
    "on_load_checkpoint": {},
    "backward": {"accumulate_grad_batches": 3},
}


def with_hook(name):
    """A subclass whose hook of that name notes that it ran, and calls nothing of the class above."""
    ran = []

    def hook(self, *args, **kwargs):
        ran.append(name)
        if name == "backward":
            args[0].backward()

    return type("Own", (Regression,), {name: hook}), ran


@pytest.mark.sampled(4)
@SEEN
@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_hook_without_super_loses_nothing(name, sam, tmp_path):
    own, ran = with_hook(name)
    trained, runs = [], []
    for kind in (Regression, own):
        torch.manual_seed(0)
        task = kind(optimizer=sgd(), sam=sam, **SETTINGS[name])
        run = trainer(tmp_path, max_epochs=3)
        run.fit(task, Batches(), Batches(seed=9))
        run.save_checkpoint(tmp_path / "own.ckpt")
        run.fit_loop.max_epochs = 5
        run.fit(task, Batches(), Batches(seed=9), ckpt_path=tmp_path / "own.ckpt")
        trained.append(task)
        runs.append((run.global_step, run.accumulate_grad_batches, run.callback_metrics["train/loss_epoch"].item()))
    assert ran
    assert_same_weights(*trained)
    assert runs[0] == runs[1]


def test_what_the_own_hook_gives_stands():
    class Skips(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            return -1

    task = Skips(optimizer=sgd())
    before = [p.clone() for p in task.parameters()]
    trainer(max_epochs=1).fit(task, Batches(), Batches(seed=9))
    assert all(map(torch.equal, before, task.parameters()))


def test_a_hook_that_calls_super_runs_it_once_however_deep(tmp_path):
    calls = []

    class Base(Regression):
        def setup(self, stage):
            calls.append("base")
            super().setup(stage)

    class Mixin:
        def setup(self, stage):
            calls.append("mixin")

    class Deep(Mixin, Base):
        pass

    class Deeper(Deep):
        def setup(self, stage):
            calls.append("deeper")
            super().setup(stage)

    task = Deeper(optimizer=sgd(), accumulate_grad_batches=2)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(task, Batches(), Batches(seed=9))
    assert calls == ["deeper", "mixin", "base"]
    assert run.global_step == 2


def test_own_callbacks_join_those_of_the_task(tmp_path):
    class Own(Regression):
        def configure_callbacks(self):
            return DeviationAwareScaling(0.1)

    run = trainer(tmp_path, max_epochs=1)
    plain = trainer(tmp_path, max_epochs=1)
    run.fit(Own(optimizer=sgd()), Batches(), Batches(seed=9))
    plain.fit(Regression(optimizer=sgd()), Batches(), Batches(seed=9))
    kinds = [type(each) for each in run.callbacks]
    assert DeviationAwareScaling in kinds
    assert [kind for kind in kinds if kind is not DeviationAwareScaling] == [type(each) for each in plain.callbacks]


def test_a_training_step_that_leaves_sam_out_is_refused(tmp_path):
    class Own(Regression):
        def training_step(self, batch, batch_idx):
            return self.loss(batch, batch_idx)

    trainer(tmp_path, max_epochs=1).fit(Own(optimizer=sgd()), Batches(), Batches(seed=9))
    with pytest.raises(ValueError, match=r"expected Own.training_step\(\) to call super\(\).training_step") as error:
        trainer(tmp_path, max_epochs=1).fit(Own(optimizer=sgd(), sam=SAM()), Batches(), Batches(seed=9))
    assert "write loss() in its place" in str(error.value)


def test_sam_refuses_to_maximize(tmp_path):
    with pytest.raises(ValueError, match="maximize=True; let loss"):
        trainer(tmp_path, max_epochs=1).fit(
            Regression(optimizer=sgd(maximize=True), sam=SAM()), Batches(), Batches(seed=9)
        )


@SEEN
def test_the_loss_of_an_epoch_is_the_mean_over_items(sam, tmp_path):
    class Kept(Regression):
        def loss(self, batch, batch_idx):
            loss = super().loss(batch, batch_idx)
            if not self.perturbed:
                self.losses.append(loss.item() * len(batch[0]))
            return loss

    data = Batches()
    data.batches[-1] = tuple(part[:3] for part in data.batches[-1])
    task = Kept(optimizer=sgd(), sam=sam)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(task, data, Batches(seed=9))
    assert run.callback_metrics["train/loss_epoch"].item() == pytest.approx(sum(task.losses) / 27, rel=1e-6)
    assert run.callback_metrics["train/loss"].item() == pytest.approx(sum(task.losses) / 27, rel=1e-6)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averages_hold_integers_as_they_are(tmp_path):
    """torch would cut 0.9 · 384 + 0.1 · 384 off to 383."""

    class Counted(Regression):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.register_buffer("places", torch.tensor([384, 96, 8, 1]))
            self.register_buffer("level", torch.tensor(0.0))
            self.inner_norm = nn.BatchNorm1d(6)

        def loss(self, batch, batch_idx):
            self.level += 1.0
            return super().loss((self.inner_norm(batch[0]), batch[1]), batch_idx)

    class Seen(Callback):
        def on_validation_start(self, trainer, pl_module):
            self.places, self.level = pl_module.places.tolist(), pl_module.level.item()

    seen, task = Seen(), Counted(optimizer=sgd())
    run = trainer(tmp_path, max_epochs=3, callbacks=[EMAWeightAveraging(decay=0.9), seen])
    run.fit(task, Batches(), Batches(seed=9))
    run.validate(task, Batches(seed=9), verbose=False)
    assert seen.places == task.places.tolist() == [384, 96, 8, 1]
    assert 1.0 < seen.level < 12.0  # what is not an integer is averaged
    assert task.inner_norm.num_batches_tracked == 12
