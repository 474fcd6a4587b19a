"""The loss over an epoch, the last window of an epoch, and runs that diverge."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from tenzoo.tasks import SAM
from tenzoo.training import DivergenceError, EpochMean, LossWatch, check_finite, check_last_loss
from tests.tasks.toy import Batches, Regression, assert_same_weights, sgd, trainer

MODES = pytest.mark.parametrize("sam", [None, SAM(rho=0.05)])


class Losses(Regression):
    """Remembers the loss of every training batch, at the unperturbed weights."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen: list[list[float]] = []

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.seen.append([])

    def loss(self, batch, batch_idx):
        loss = super().loss(batch, batch_idx)
        if not self.perturbed:
            self.seen[-1].append(loss.item())
        return loss


class AtEpochEnd(Callback):
    """What a monitor can read when an epoch has ended."""

    def __init__(self):
        self.values = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.values.append({k: v.item() for k, v in trainer.callback_metrics.items()})


@MODES
def test_the_loss_can_be_monitored_whatever_is_logged(sam, tmp_path):
    """Early stopping, checkpoints and plateau schedulers read the mean over the epoch, with 50 steps between logs."""
    torch.manual_seed(1)
    model = Losses(
        optimizer=sgd(),
        sam=sam,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, threshold=0.9, factor=0.5
        ),
        lr_scheduler_monitor="train/loss",
    )
    stopping = EarlyStopping("train/loss", patience=50)
    best = ModelCheckpoint(tmp_path, monitor="train/loss", filename="best")
    fit = trainer(tmp_path, max_epochs=6, log_every_n_steps=50, enable_checkpointing=True, callbacks=[stopping, best])
    fit.fit(model, Batches(), Batches(seed=9))
    means = [sum(losses) / 4 for losses in model.seen]
    assert fit.callback_metrics["train/loss"].item() == pytest.approx(means[-1], rel=1e-6)
    assert best.best_model_score.item() == pytest.approx(min(means), rel=1e-6)
    assert stopping.best_score.item() == pytest.approx(min(means), rel=1e-6)
    assert fit.lr_scheduler_configs[0].scheduler.best == pytest.approx(means[0], rel=1e-6)
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**5)


def test_a_checkpoint_within_an_epoch_sees_the_loss_of_its_own_step(tmp_path):
    model = Losses(optimizer=sgd())
    best = ModelCheckpoint(
        tmp_path, monitor="train/loss", every_n_train_steps=1, save_on_train_epoch_end=False, save_top_k=-1
    )
    trainer(tmp_path, max_epochs=1, log_every_n_steps=50, enable_checkpointing=True, callbacks=[best]).fit(
        model, Batches(), Batches()
    )
    scores = sorted(score.item() for score in best.best_k_models.values())
    assert scores == pytest.approx(sorted(model.seen[0]), rel=1e-6)


@MODES
def test_loggers_get_the_loss_of_logged_steps_and_the_mean_of_each_epoch(sam, tmp_path):
    logger = CSVLogger(tmp_path, name="", version=0)
    model = Losses(optimizer=sgd(), sam=sam)
    trainer(tmp_path, max_epochs=2, log_every_n_steps=2, logger=logger).fit(model, Batches(), Batches())
    rows = [line.split(",") for line in (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()]

    def column(name):
        at = rows[0].index(name)
        return [float(row[at]) for row in rows[1:] if row[at]]

    first, second = model.seen
    assert column("train/loss") == pytest.approx([first[1], first[3], second[1], second[3]], rel=1e-6)
    assert column("train/loss_epoch") == pytest.approx([sum(first) / 4, sum(second) / 4], rel=1e-6)


class Resumable(Batches):
    """Goes on where it stopped."""

    at = 0

    def __iter__(self):
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@MODES
def test_the_mean_of_an_epoch_survives_a_stop_in_its_middle(sam, tmp_path):
    class SaveAtThree(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    def run(*callbacks, resume=None):
        torch.manual_seed(1)
        model, end = Regression(optimizer=sgd(), sam=sam), AtEpochEnd()
        trainer(max_epochs=2, callbacks=[end, *callbacks]).fit(model, Resumable(), Batches(), ckpt_path=resume)
        return model, end.values

    whole, values = run(SaveAtThree())
    resumed, rest = run(resume=tmp_path / "three.ckpt")
    assert rest[0]["train/loss"] == values[0]["train/loss"]
    assert_same_weights(whole, resumed)


class Rank:
    """The part of a trainer that the mean asks: one of two processes."""

    world_size = 2

    def __init__(self, rank):
        self.global_rank = rank


def test_a_mean_over_processes_goes_on_with_each_ones_part(monkeypatch):
    rows = torch.tensor([[6.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
    for rank, values in ((0, [1.0, 2.0, 3.0]), (1, [2.0])):

        def gathered(trainer, own):
            assert own.equal(rows[trainer.global_rank])
            return rows

        monkeypatch.setattr("tenzoo.training.gather", gathered)
        mean = EpochMean()
        for value in values:
            mean.add(torch.tensor(value), 1)
        assert mean.compute(Rank(rank)) == 2
        state = mean.state(Rank(rank))
        again = EpochMean()
        again.load(state, Rank(rank))
        assert again.state(Rank(rank)).equal(rows)


# --- the last window ---


class Unsized(Batches):
    __len__ = None


@pytest.mark.parametrize("kind", [Batches, Unsized])
@pytest.mark.parametrize("sam", [None, SAM(rho=0)])
@pytest.mark.parametrize("count", [4, 5])
def test_a_short_window_at_the_end_of_an_epoch_takes_the_mean_over_its_own_batches(sam, count, kind):
    batches = kind(count=count)
    torch.manual_seed(1)
    reference = Regression()
    reference.log = lambda *args, **kwargs: None
    parameters = list(reference.parameters())
    for start in range(0, count, 3):
        window = batches.batches[start : start + 3]
        loss = sum(reference.loss(batch, 0) for batch in window) / len(window)
        with torch.no_grad():
            for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= 0.1 * grad
    torch.manual_seed(1)
    model = Regression(optimizer=sgd(), sam=sam, accumulate_grad_batches=3)
    fit = trainer(max_epochs=1)
    fit.fit(model, batches, Batches())
    assert fit.global_step == 2
    for one, two in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


# --- divergence ---


class Poisoned(Callback):
    """Makes a weight NaN at a step, as a diverging run does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.inner.bias[2] = math.nan


@MODES
def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(sam, tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="last", enable_version_counter=False)
    fit = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[Poisoned(3), saver])
    with pytest.raises(DivergenceError, match=r"'inner\.bias' is not finite after 3 steps, and was not saved; lower"):
        fit.fit(Regression(optimizer=sgd(), sam=sam), Batches(), Batches())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@MODES
def test_a_diverged_run_stops_without_checkpoints_too(sam):
    with pytest.raises(DivergenceError, match=r"'inner\.weight' is not finite after"):
        trainer(max_epochs=60, log_every_n_steps=1000).fit(
            Regression(optimizer=sgd(lr=1e30), sam=sam), Batches(), Batches()
        )


def test_a_loss_that_is_logged_tells_at_once():
    fit = trainer(max_epochs=3, log_every_n_steps=1, callbacks=[Poisoned(1)])
    with pytest.raises(DivergenceError, match="after 1 steps"):
        fit.fit(Regression(optimizer=sgd()), Batches(count=50), Batches())


class BadBatches(Batches):
    """A NaN in some batches."""

    def __init__(self, *bad, count=5):
        super().__init__(count=count)
        for number in bad:
            self.batches[number][0][0, 0] = math.nan


@MODES
@pytest.mark.parametrize("every", [1, 1000])
def test_the_step_is_named(sam, every):
    """Whether the loss is looked at in that step or not until the end of the epoch."""
    words = (
        r"the loss is not finite from step 3 on, (the gradient of 'inner\.weight' is not finite, )?'inner\.\w+' is not"
    )
    with pytest.raises(DivergenceError, match=words) as caught:
        trainer(max_epochs=2, log_every_n_steps=every).fit(
            Regression(optimizer=sgd(), sam=sam), BadBatches(2), Batches()
        )
    assert ("gradient of" in str(caught.value)) is (every == 1 and sam is None)  # elsewhere it is gone by then


class Skips(Regression):
    """Makes no step with a loss that is not finite, as the scaler of float16 does."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer_closure()
        if all(each.grad is None or bool(each.grad.isfinite().all()) for each in self.parameters()):
            optimizer.step()

    def on_train_end(self):  # a user's own, without super()
        pass


@pytest.mark.parametrize(("bad", "step"), [((3, 4), 9), ((4,), 10), (range(5), 1)])
def test_a_run_that_ends_with_a_loss_that_is_not_finite_fails(bad, step):
    with pytest.raises(DivergenceError, match=f"the loss is not finite from step {step} on, though the weights are"):
        trainer(max_epochs=2).fit(Skips(optimizer=sgd(), norm=False), BadBatches(*bad), Batches())


def test_a_run_may_pass_a_loss_that_is_not_finite():
    trainer(max_epochs=2).fit(Skips(optimizer=sgd(), norm=False), BadBatches(1, 3), Batches())


def test_losses_are_watched_step_by_step():
    watch = LossWatch()
    assert watch.since() is None
    for step, loss in enumerate([1.0, math.inf, 2.0, math.nan, -math.inf], start=1):
        watch.add(torch.tensor(loss), step)
    assert watch.since() == 4
    watch.add(torch.tensor(1.0), 6)
    assert watch.since() is None


def test_a_process_with_a_bad_loss_stops_all(monkeypatch):
    """The others have a finite loss of their own share."""

    class Two(SimpleNamespace):
        world_size = 2
        strategy = SimpleNamespace(root_device=torch.device("cpu"))

    monkeypatch.setattr("tenzoo.training.true_everywhere", lambda fact, device: False)
    monkeypatch.setattr("tenzoo.training.gather", lambda trainer, tensor: torch.stack([tensor, torch.tensor(7)]))
    watch = LossWatch()
    watch.add(torch.tensor(1.0), 9)
    with pytest.raises(DivergenceError, match="from step 7 on"):
        check_last_loss(Two(), watch)


def test_large_and_complex_weights_are_finite():
    module = torch.nn.Module()
    module.large = torch.nn.Parameter(torch.full((4,), 3e38))  # whose norm overflows
    module.complex = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    module.empty = torch.nn.Parameter(torch.empty(0))
    check_finite(module, when="now")
    module.complex.data[1] = complex(0, math.inf)
    with pytest.raises(DivergenceError, match="'complex' is not finite now"):
        check_finite(module, when="now")
