"""Schedules over the whole run, against their closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from tenzoo.tasks import SAM
from tenzoo.tasks.schedulers import schedule_over_run
from tests.tasks.toy import Batches, Regression, adam, assert_same_weights, sgd, trainer


class Settings(Callback):
    """Learning rate and momentum (or first beta) of every parameter group at every step of the optimizer."""

    def __init__(self) -> None:
        self.lrs: list[list[float]] = []
        self.momenta: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.lrs.append([group["lr"] for group in optimizer.param_groups])
        group = optimizer.param_groups[0]
        self.momenta.append(group["betas"][0] if "betas" in group else group.get("momentum"))


def cosine(lr, step, total):
    return lr / 2 * (1 + math.cos(math.pi * step / total))


def one_cycle(lr, step, total, *, low=1 / 25, last=1 / 25e4):
    """Up along a half cosine over three tenths of the run, then down along another."""

    def between(start, end, fraction):
        return start + (end - start) * (1 - math.cos(math.pi * fraction)) / 2

    peak, end = 0.3 * total - 1, total - 1
    if step <= peak:
        return between(lr * low, lr, step / peak)
    return between(lr, lr * last, (step - peak) / (end - peak))


def momentum_of_one_cycle(step, total):
    """Falls from 0.95 to 0.85 while the rate rises, and rises again."""
    return 0.95 - 0.1 * one_cycle(1, step, total, low=0, last=0)


CLOSED = {"cosine": cosine, "one_cycle": one_cycle}


def fit(epochs=5, *, path=None, resume=None, seed=1, batches=None, fit=None, **task):
    """Train on 4 batches an epoch, from a step if resumed; returns the model, and what its optimizer stepped with."""
    torch.manual_seed(seed)
    settings = Settings()
    callbacks = [settings]
    if path is not None:
        callbacks.append(ModelCheckpoint(path, every_n_train_steps=4, save_top_k=-1, filename="{step}"))
        resume = resume and path / f"step={resume}.ckpt"
    model = Regression(**{"optimizer": sgd(0.3, momentum=0.9), **task})
    run = trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=path is not None, **(fit or {}))
    run.fit(model, batches or Batches(), Batches(seed=9), ckpt_path=resume, weights_only=True)
    return model, settings


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("sam", [None, SAM(rho=0.05)])
@pytest.mark.parametrize(("accumulate", "steps"), [(1, 20), (3, 10)])
def test_the_schedule_spans_the_run(name, sam, accumulate, steps):
    """3 does not divide the 4 batches of an epoch: there are 2 steps in each."""
    _, settings = fit(lr_scheduler=name, sam=sam, accumulate_grad_batches=accumulate)
    expected = [CLOSED[name](0.3, step, steps) for step in range(steps)]
    assert [lr for (lr,) in settings.lrs] == pytest.approx(expected, rel=1e-9)
    momenta = [0.9 if name == "cosine" else momentum_of_one_cycle(step, steps) for step in range(steps)]
    assert settings.momenta == pytest.approx(momenta)


def test_max_steps_ends_the_run():
    _, settings = fit(lr_scheduler="cosine", fit={"max_steps": 6})
    assert [lr for (lr,) in settings.lrs] == pytest.approx([cosine(0.3, step, 6) for step in range(6)])
    _, settings = fit(-1, lr_scheduler="cosine", fit={"max_steps": 6})
    assert [lr for (lr,) in settings.lrs] == pytest.approx([cosine(0.3, step, 6) for step in range(6)])


@pytest.mark.parametrize("name", CLOSED)
def test_an_epoch_as_the_interval_changes_nothing(name):
    model, settings = fit(lr_scheduler=name, lr_scheduler_interval="epoch")
    same, by_step = fit(lr_scheduler=name, lr_scheduler_interval="step")
    assert settings.lrs == by_step.lrs
    assert_same_weights(model, same)


@pytest.mark.parametrize("name", CLOSED)
def test_each_parameter_group_has_its_own_rate(name):
    def optimizer(parameters):
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.01}, {"params": rest}], lr=0.2)

    _, settings = fit(lr_scheduler=name, optimizer=optimizer)
    for step, lrs in enumerate(settings.lrs):
        assert lrs == pytest.approx([CLOSED[name](lr, step, 20) for lr in (0.01, 0.2)])


@pytest.mark.parametrize(
    ("optimizer", "momenta"),
    [
        (adam(0.3), [momentum_of_one_cycle(step, 20) for step in range(20)]),
        (sgd(0.3), [0] * 20),  # none is switched on
        (lambda parameters: torch.optim.Adagrad(parameters, lr=0.3), [None] * 20),
    ],
    ids=["adam", "sgd without momentum", "adagrad"],
)
def test_one_cycle_cycles_the_momentum_that_there_is(optimizer, momenta):
    _, settings = fit(lr_scheduler="one_cycle", optimizer=optimizer)
    assert [lr for (lr,) in settings.lrs] == pytest.approx([one_cycle(0.3, step, 20) for step in range(20)])
    assert settings.momenta == (pytest.approx(momenta) if momenta[0] is not None else momenta)


# --- resuming --------------------------------------------------------------------------------------------------


RESUMES = pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")


@RESUMES
@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("sam", [None, SAM(rho=0.05)])
@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, name, sam, step):
    whole, settings = fit(3, path=tmp_path, lr_scheduler=name, sam=sam)
    resumed, rest = fit(3, path=tmp_path, resume=step, lr_scheduler=name, sam=sam, seed=2)
    assert rest.lrs == settings.lrs[step:]
    assert rest.momenta == settings.momenta[step:]
    assert_same_weights(whole, resumed)


@RESUMES
@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("sam", [None, SAM(rho=0.05)])
@pytest.mark.parametrize("step", [4, 8])
def test_a_longer_run_follows_the_longer_schedule(tmp_path, name, sam, step):
    fit(2, path=tmp_path, lr_scheduler=name, sam=sam)
    _, rest = fit(5, path=tmp_path, resume=step, lr_scheduler=name, sam=sam)
    expected = [CLOSED[name](0.3, later, 20) for later in range(step, 20)]
    assert [lr for (lr,) in rest.lrs] == pytest.approx(expected)
    momenta = [0.9 if name == "cosine" else momentum_of_one_cycle(later, 20) for later in range(step, 20)]
    assert rest.momenta == pytest.approx(momenta)


@pytest.mark.parametrize("name", CLOSED)
def test_after_the_end_the_rate_stays_low(name):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    schedule = schedule_over_run(name, optimizer, SimpleNamespace(estimated_stepping_batches=10, callbacks=[]))
    rates = []
    for _ in range(25):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([CLOSED[name](0.1, step, 10) for step in range(10)])
    assert rates[10:] == ([0.0] * 15 if name == "cosine" else [rates[9]] * 15)
    assert schedule.last_epoch == 25  # a longer run goes on from here


# --- what is refused, what is kept -----------------------------------------------------------------------------


class Endless:
    def __iter__(self):
        return iter(Batches())


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("sam", [None, SAM()])
def test_a_run_without_an_end(name, sam):
    with pytest.raises(ValueError, match=f"max_steps or max_epochs .* for `lr_scheduler` '{name}', got a run without"):
        fit(-1, lr_scheduler=name, sam=sam)
    with pytest.raises(ValueError, match="data of known length"):
        fit(3, lr_scheduler=name, sam=sam, batches=Endless())


def test_an_unknown_name():
    expected = r"expected one of \['cosine', 'one_cycle'\], or a function .*, in `lr_scheduler`, got 'cosin'"
    with pytest.raises(ValueError, match=expected):
        Regression(lr_scheduler="cosin")


@pytest.mark.parametrize("name", CLOSED)
def test_the_name_is_kept_in_a_checkpoint_of_builtins(tmp_path, name):
    fit(1, path=tmp_path, lr_scheduler=name)
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["lr_scheduler"] == name
    assert len(checkpoint["lr_schedulers"]) == 1
