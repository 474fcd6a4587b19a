"""SAM's manual mode against the automatic mode of the plain optimizer."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from tenzoo.dynamics import squared_norms
from tenzoo.tasks import SAM
from tests.tasks.toy import Batches, Regression, adam, assert_same_weights, fitted, sgd, trainer

SCHEDULERS = {
    "step": {
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
        "lr_scheduler_interval": "step",
    },
    "one cycle": {
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=30),
        "lr_scheduler_interval": "step",
    },
    "epoch": {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)},
    "plateau": {
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, threshold=0.5, factor=0.5
        ),
        "lr_scheduler_monitor": "val/loss",
    },
    "plateau by step": {
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=1, threshold=0.5, factor=0.5
        ),
        "lr_scheduler_interval": "step",
        "lr_scheduler_monitor": "train/mse",
    },
}


class LearningRates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def both(fit=None, batches=None, **task):
    """The plain optimizer and SAM at ρ = 0, each with the learning rates it stepped at."""
    plain_rates, sam_rates = LearningRates(), LearningRates()
    plain = fitted(callbacks=[plain_rates], fit=fit, batches=batches, **task)
    sam = fitted(callbacks=[sam_rates], fit=fit, batches=batches, sam=SAM(rho=0), **task)
    assert plain.automatic_optimization
    assert not sam.automatic_optimization
    return plain, sam, plain_rates.rates, sam_rates.rates


@pytest.mark.sampled(2)
@pytest.mark.parametrize("optimizer", [sgd(momentum=0.9), adam()])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "clip", [{}, {"gradient_clip_val": 0.05}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}]
)
def test_rho_zero_is_the_plain_optimizer_bit_for_bit(optimizer, accumulate, clip):
    """20 optimizer steps; 3 does not divide the 4 batches of an epoch, so the last window of each is short."""
    fit = {"max_epochs": 5 if accumulate == 1 else 10}
    plain, sam, rates, sam_rates = both(
        fit=fit, optimizer=optimizer, accumulate_grad_batches=accumulate, norm=True, dropout=0.3, **clip
    )
    assert len(rates) == len(sam_rates) == 20
    assert_same_weights(plain, sam)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedulers_step_as_in_automatic_mode(name, accumulate):
    plain, sam, rates, sam_rates = both(optimizer=sgd(), accumulate_grad_batches=accumulate, **SCHEDULERS[name])
    assert len(set(rates)) > 1
    assert sam_rates == rates
    assert_same_weights(plain, sam)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_that_of_automatic_mode(precision):
    def fit():
        plugin = MixedPrecision(
            precision, "cpu", scaler=torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
        )
        return {"plugins": [plugin]}

    kwargs = {"optimizer": sgd(), "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    plain = fitted(fit=fit(), **kwargs)
    assert_same_weights(plain, fitted(fit=fit(), sam=SAM(rho=0), **kwargs))
    moved = fitted(fit=fit(), sam=SAM(rho=0.5), **kwargs)
    assert not moved.weight.cores[0].equal(plain.weight.cores[0])
    assert all(value.isfinite().all() for value in moved.state_dict().values())


def test_an_overflow_of_float16_skips_the_step_and_shrinks_the_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows float16 for many steps
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    torch.manual_seed(1)
    model = Regression(optimizer=sgd(), sam=SAM(rho=0.1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer(plugins=[plugin], max_epochs=2).fit(model, Batches(), Batches())
    assert scaler.get_scale() < 2.0**40
    assert all(parameter.equal(old) for parameter, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("sam", [SAM(rho=0.1), SAM(rho=0.3, adaptive=True), SAM(rho=0.2, scope="cores")])
def test_the_step_is_that_of_a_hand_written_sam(sam):
    batches = Batches(count=1)
    torch.manual_seed(1)
    reference = Regression()
    reference.log = lambda *args, **kwargs: None
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        reference.loss(batches.batches[0], 0).backward()
        moved = list(reference.weight.cores) if sam.scope == "cores" else list(reference.parameters())
        weights = [parameter.detach().clone() for parameter in moved]
        scaled = [p.detach().abs() * p.grad if sam.adaptive else p.grad for p in moved]
        norm = torch.sqrt(sum(s.square().sum() for s in scaled))
        with torch.no_grad():
            for parameter, direction in zip(moved, scaled, strict=True):
                parameter += sam.rho / norm * direction * (parameter.abs() if sam.adaptive else 1)
        optimizer.zero_grad()
        reference.loss(batches.batches[0], 0).backward()
        with torch.no_grad():
            for parameter, weight in zip(moved, weights, strict=True):
                parameter.copy_(weight)
        optimizer.step()
    model = fitted(batches=batches, optimizer=sgd(), sam=sam)
    for (name, one), (_, two) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7, msg=name)


def test_accumulation_perturbs_for_each_batch():
    """The step is the mean of each micro-batch's own SAM gradient."""
    batches = Batches(count=3)
    torch.manual_seed(1)
    reference = Regression()
    reference.log = lambda *args, **kwargs: None
    parameters = list(reference.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        grads = torch.autograd.grad(reference.loss(batch, 0), parameters)
        norm = squared_norms(grads).sum().sqrt()
        weights = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter += 0.5 * grad / norm
        grads = torch.autograd.grad(reference.loss(batch, 0), parameters)
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        total = [t + g / 3 for t, g in zip(total, grads, strict=True)]
    expected = [parameter - 0.1 * t for parameter, t in zip(parameters, total, strict=True)]
    model = fitted(batches=batches, fit={"max_epochs": 1}, optimizer=sgd(), sam=SAM(rho=0.5), accumulate_grad_batches=3)
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value, rtol=1e-5, atol=1e-7)


def test_statistics_dropout_and_logs_see_one_pass():
    class Recorder(Regression):
        def loss(self, batch, batch_idx):
            self.training and masks.append(self.dropout(torch.ones(20)))
            losses.append(super().loss(batch, batch_idx))
            return losses[-1]

    masks: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    torch.manual_seed(1)
    model = Recorder(norm=True, dropout=0.5, optimizer=sgd(), sam=SAM(rho=0.5))
    fit = trainer(max_epochs=1)
    fit.fit(model, Batches(), Batches())
    assert isinstance(model.norm, nn.BatchNorm1d)
    assert model.norm.num_batches_tracked == 4
    assert model.norm.track_running_stats
    pairs = list(zip(masks[::2], masks[1::2], strict=True))
    assert len(pairs) == 4
    assert all(first.equal(second) for first, second in pairs)
    assert not pairs[0][0].equal(pairs[1][0])
    plain = fitted(norm=True, fit={"max_epochs": 1}, batches=Batches(count=1), optimizer=sgd())
    sam = fitted(norm=True, fit={"max_epochs": 1}, batches=Batches(count=1), optimizer=sgd(), sam=SAM(rho=5.0))
    assert sam.norm.running_mean.equal(plain.norm.running_mean)  # the pass at the old weights
    assert fit.callback_metrics["train/mse"] == losses[6]  # the first pass of the last batch
    torch.testing.assert_close(fit.callback_metrics["train/loss"], sum(losses[::2]).detach() / 4)


def test_logged_values_are_those_of_automatic_mode():
    values = []
    for sam in (None, SAM(rho=0)):
        torch.manual_seed(1)
        fit = trainer(max_epochs=2)
        fit.fit(Regression(optimizer=sgd(), sam=sam), Batches(), Batches(seed=9))
        values.append({key: value.item() for key, value in fit.callback_metrics.items()})
    assert values[0] == values[1]
    assert set(values[0]) == {"train/loss", "train/loss_epoch", "train/mse", "val/loss"}


@pytest.mark.parametrize("sam", [None, SAM(rho=0.1)])
def test_max_steps_and_checkpoints_count_optimizer_steps(tmp_path, sam):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit = trainer(max_epochs=-1, max_steps=5, enable_checkpointing=True, callbacks=[checkpoint])
    fit.fit(Regression(optimizer=sgd(), sam=sam, accumulate_grad_batches=2), Batches(), Batches())
    assert fit.global_step == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]


class ByHand(LightningModule):
    """Manual optimization, of a module that is no task."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(6, 3)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.layer(batch[0]) - batch[1]).square().mean())
        optimizer.step()


@pytest.mark.parametrize("fails", [False, True])
def test_lightning_s_warnings_are_silenced_in_the_fit_alone(tmp_path, fails):
    class Failing(Callback):
        def on_train_batch_end(self, *args):
            if fails:
                raise KeyError("on purpose")

    def fit(model, name, *callbacks):
        saver = ModelCheckpoint(tmp_path / name, every_n_train_steps=1)
        one = trainer(max_epochs=1, enable_checkpointing=True, callbacks=[saver, *callbacks])
        one.fit(model, Batches(), None if isinstance(model, ByHand) else Batches())

    before = list(warnings.filters)
    with pytest.raises(KeyError, match="on purpose") if fails else nullcontext():
        fit(Regression(optimizer=sgd(), sam=SAM()), "sam", Failing())
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="ModelCheckpoint with manual optimization"):
        fit(ByHand(), "by hand")


def test_a_loss_that_raises_leaves_the_weights_as_they_were():
    class Broken(Regression):
        def loss(self, batch, batch_idx):
            if self.perturbed:
                raise KeyError("second pass")
            return super().loss(batch, batch_idx)

    torch.manual_seed(1)
    model = Broken(optimizer=sgd(), sam=SAM(rho=1.0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(KeyError, match="second pass"):
        trainer().fit(model, Batches(), Batches())
    assert all(parameter.equal(old) for parameter, old in zip(model.parameters(), before, strict=True))
    assert not model.perturbed


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rho": -1.0}, r"finite number >= 0 in `sam\.rho`, got -1\.0"),
        ({"rho": float("nan")}, r"finite number >= 0 in `sam\.rho`"),
        ({"scope": "some"}, r"'all' or 'cores' in `sam\.scope`, got 'some'"),
    ],
)
def test_bad_settings(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SAM(**kwargs)


def test_a_mapping_is_taken_for_the_settings():
    assert Regression(sam={"rho": 0.2}).sam == SAM(rho=0.2)


def test_lbfgs_is_refused():
    model = Regression(optimizer=torch.optim.LBFGS, sam=SAM())
    with pytest.raises(ValueError, match="first-order optimizer with `sam`, got LBFGS"):
        trainer().fit(model, Batches(), Batches())


def test_scope_cores_needs_cores():
    class Plain(Regression):
        def __init__(self):
            super().__init__(sam=SAM(scope="cores"))
            self.weight = nn.Identity()

    with pytest.raises(ValueError, match=r"core groups in Plain for `sam\.scope` 'cores', found none"):
        trainer().fit(Plain(), Batches(), Batches())
