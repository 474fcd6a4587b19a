"""The monitor at the very step: manual optimization, several steps and optimizers, skipped steps, momentum."""

import csv
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor, PredictsDeviationRate
from tenzoo.dynamics import norm_deviation, norm_gradient_covariance, squared_norms
from tenzoo.factorizations import CP
from tenzoo.tasks import SAM
from tests.callbacks.test_monitor import QUANTITIES, monitored
from tests.tasks.toy import Batches, Regression, sgd, trainer


class Manual(LightningModule):
    """Two tensors under manual optimization, and a loop of the user's own."""

    def __init__(self, loop, optimizers=None):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = CP((4, 5, 6), 3), CP((4, 5, 6), 2)
        with torch.no_grad():
            self.first.cores[1].mul_(2.0)
        self.loop = loop
        self.optimizers_of = optimizers or (lambda model: torch.optim.SGD(model.parameters(), lr=1e-3))

    def loss(self):
        return (self.first.reconstruct() + self.second.reconstruct() - 1).square().sum()

    def configure_optimizers(self):
        return self.optimizers_of(self)

    def training_step(self, batch, batch_idx):
        self.loop(self)


def one_step(model, zero=None, loss=None):
    optimizer = model.optimizers()
    optimizer.zero_grad()
    model.manual_backward((loss or Manual.loss)(model))
    optimizer.step()
    if zero is not None:
        optimizer.zero_grad(set_to_none=zero)


def logged_of(tmp_path, model, steps=2, callbacks=(), batches=None, **fit):
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(callbacks=[*callbacks, NormDynamicsMonitor()], logger=logger, max_steps=steps, **fit)
    run.fit(model, batches or Batches(count=8))
    return read(tmp_path)


def read(tmp_path):
    with (tmp_path / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("norms/first/deviation")]


def by_hand(model):
    """Q and Cov of the first tensor, with the gradients that are there."""
    cores = list(model.first.cores)
    s, gamma = squared_norms([core.detach() for core in cores]), squared_norms([core.grad for core in cores])
    return norm_deviation(s).item(), norm_gradient_covariance(s, gamma).item()


@pytest.mark.parametrize("step", ["lightning", "raw", "raw after lightning", "lightning after raw"])
def test_a_step_is_measured_from_where_it_begins(tmp_path, step):
    """The loop changes cores in the batch, and steps with or without Lightning's knowledge."""
    seen = []

    def loop(model):
        optimizer = model.optimizers()
        for kind in step.split(" after ")[::-1]:
            optimizer.zero_grad()
            with torch.no_grad():
                model.first.cores[0].mul_(0.5)
            model.manual_backward(model.loss())
            before, covariance = by_hand(model)
            (optimizer if kind == "lightning" else optimizer.optimizer).step()
            last = before, covariance, (by_hand(model)[0] - before) / 1e-3
        seen.append(last)

    steps = step.count("lightning")
    logged = logged_of(tmp_path, Manual(loop), 4, precision="64-true", **({} if steps else {"max_epochs": 1}))
    assert len(logged) == len(seen) == (4 if steps == 1 else 8)
    for row, values in zip(logged, seen, strict=True):
        keys = ("deviation", "covariance", "measured_rate")
        assert [float(row[f"norms/first/{key}"]) for key in keys] == pytest.approx(list(values), rel=1e-9)


@pytest.mark.parametrize("first", [True, False])
def test_what_callbacks_do_to_the_cores_before_a_step_is_part_of_it(tmp_path, first):
    class Growing(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(by_hand(pl_module))
            with torch.no_grad():
                pl_module.first.cores[0].mul_(1.5)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(by_hand(pl_module))

    seen, logger = [], CSVLogger(tmp_path, name="", version="")
    callbacks = [Growing(), NormDynamicsMonitor()][:: 1 if first else -1]
    run = trainer(callbacks=callbacks, logger=logger, max_steps=1, precision="64-true")
    run.fit(Manual(one_step), Batches(count=1))
    (row,) = read(tmp_path)
    (before, covariance), (after, _) = seen
    assert float(row["norms/first/deviation"]) == pytest.approx(before)
    assert float(row["norms/first/covariance"]) == pytest.approx(covariance)
    assert float(row["norms/first/measured_rate"]) == pytest.approx((after - before) / 1e-3)


def test_any_callback_that_predicts_its_rate_is_asked(tmp_path):
    class Shrinking(Callback):
        """Of a user's own, so weak that its first order is exact."""

        def deviation_rate(self, trainer, optimizer, squared_norms, squared_grad_norms, setting):
            assert squared_norms.shape == squared_grad_norms.shape == (2, 3)
            return norm_deviation(squared_norms) * -4e-6 / setting["lr"]

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            with torch.no_grad():
                for core in [*pl_module.first.cores, *pl_module.second.cores]:
                    core.mul_(1 - 1e-6)

    assert isinstance(Shrinking(), PredictsDeviationRate)
    assert isinstance(DeviationAwareScaling(0.5), PredictsDeviationRate)
    assert not isinstance(NormDynamicsMonitor(), PredictsDeviationRate)
    (plain,), (own,) = (
        logged_of(tmp_path / str(len(callbacks)), Manual(one_step), 1, callbacks, precision="64-true")
        for callbacks in ([], [Shrinking()])
    )
    for group in ("first", "second", "total"):
        predicted, measured = (
            float(own[f"norms/{group}/{key}_rate"]) - float(plain[f"norms/{group}/{key}_rate"])
            for key in ("predicted", "measured")
        )
        assert predicted < -1e-3
        assert predicted == pytest.approx(measured, rel=1e-2)


def test_das_has_no_part_in_a_step_that_goes_past_lightning(tmp_path):
    def loop(model):
        model.zero_grad()
        model.manual_backward(model.loss())
        model.optimizers().optimizer.step()

    fit = {"precision": "64-true", "max_epochs": 1}
    plain = logged_of(tmp_path / "plain", Manual(loop), -1, **fit)
    assert logged_of(tmp_path / "das", Manual(loop), -1, [DeviationAwareScaling(0.5)], **fit) == plain
    assert len(plain) == 8


def test_a_closure_that_goes_past_lightning_is_named():
    def loop(model):
        def closure():
            model.zero_grad()
            model.manual_backward(model.loss())

        model.optimizers().optimizer.step(closure)

    with pytest.warns(UserWarning, match=r"NormDynamicsMonitor leaves out a step with a closure .* `step\(closure\)`"):
        trainer(callbacks=[monitor := NormDynamicsMonitor()], max_epochs=1).fit(Manual(loop), Batches(count=1))
    assert monitor.state_dict() == {"history": {}}


def test_a_search_for_the_learning_rate_is_not_looked_at(tmp_path):
    class Automatic(Manual):
        def training_step(self, batch, batch_idx):
            return self.loss()

    model = Automatic(None, lambda model: torch.optim.SGD(model.parameters(), lr=model.lr))
    model.automatic_optimization, model.lr = True, 1e-3
    finder = LearningRateFinder(1e-6, 1e-4, num_training_steps=5)
    steps = [int(row["step"]) for row in logged_of(tmp_path, model, 3, [finder])]
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("after", ["nothing", "zeros", "none", "another backward pass"])
def test_gradients_are_those_of_the_step_whatever_comes_after_it(tmp_path, after):
    def loop(model):
        one_step(model, {"zeros": False, "none": True}.get(after))
        if after == "another backward pass":
            model.manual_backward(100 * model.loss())

    logged = logged_of(tmp_path / "own", Manual(loop), precision="64-true")
    expected = logged_of(tmp_path / "expected", Manual(one_step), precision="64-true")
    assert len(logged) == len(expected) == 2
    assert logged == expected
    for row in logged:
        measured = float(row["norms/first/measured_rate"])
        assert measured == pytest.approx(float(row["norms/first/predicted_rate"]), rel=0.2)


def test_of_two_steps_in_a_batch_the_second_is_logged_once(tmp_path):
    def twice(model):
        one_step(model)
        one_step(model)

    single = logged_of(tmp_path / "single", Manual(one_step), 4, precision="64-true")
    double = logged_of(tmp_path / "double", Manual(twice), 4, precision="64-true")
    names = {key for key in single[0] if key.startswith("norms/")}
    assert any(key.startswith("norms/total/") for key in names)
    assert [{key: row[key] for key in names} for row in double] == [
        {key: row[key] for key in names} for row in single[1::2]
    ]


def test_with_two_optimizers_the_total_counts_each_group_once(tmp_path):
    def split(model):
        return [torch.optim.SGD(tensor.parameters(), lr=1e-3) for tensor in (model.first, model.second)]

    def loop(model):
        for optimizer in model.optimizers():
            optimizer.zero_grad()
        model.manual_backward(model.loss())
        for optimizer in model.optimizers():
            optimizer.step()

    logged = logged_of(tmp_path / "split", Manual(loop, split), 4, precision="64-true")
    expected = logged_of(tmp_path / "one", Manual(one_step), 2, precision="64-true")
    names = {key for key in expected[0] if key.startswith("norms/")}
    for row, other in zip(logged, expected, strict=True):
        for name in names:
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-12), name
        for name in ("measured_rate", "predicted_rate"):  # of groups with one learning rate
            sums = sum(float(row[f"norms/{group}/{name}"]) for group in ("first", "second"))
            assert float(row[f"norms/total/{name}"]) == pytest.approx(sums)


def test_the_total_is_logged_where_all_groups_step(tmp_path):
    """One optimizer in each batch, the other one in each second."""

    def split(model):
        return [torch.optim.SGD(tensor.parameters(), lr=1e-3) for tensor in (model.first, model.second)]

    def loop(model):
        for number, optimizer in enumerate(model.optimizers()):
            if number == 0 or len(seen) % 2:
                model.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                model.manual_backward(model.loss())
                optimizer.step()
                model.untoggle_optimizer(optimizer)
        seen.append(None)

    seen = []
    logged = logged_of(tmp_path, Manual(loop, split), -1, max_epochs=1)
    assert len(logged) == 8
    for number, row in enumerate(logged):
        parts = [row[f"norms/{name}/deviation"] for name in ("first", "second")]
        if number % 2:
            assert float(row["norms/total/deviation"]) == pytest.approx(sum(map(float, parts)))
        else:
            assert not parts[1]
            assert not row["norms/total/deviation"]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_is_left_out(tmp_path, fused):
    class Overflowing(Manual):
        def training_step(self, batch, batch_idx):
            return self.loss() * (float("inf") if batch_idx == 1 else 1.0)

    model = Overflowing(None, lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, fused=fused))
    model.automatic_optimization = True
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    monitor = NormDynamicsMonitor()
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(callbacks=[monitor], logger=logger, max_steps=3, plugins=plugins)
    run.fit(model, Batches(count=3))
    assert [int(row["step"]) for row in read(tmp_path)] == [0, 2]
    assert all(value == value for rows in monitor.state_dict()["history"].values() for row in rows for value in row)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("where", ["all", "second"])  # of the tensors: one of them alone stops the step of both
def test_a_step_that_is_skipped_after_one_in_the_same_batch_leaves_that_one(tmp_path, fused, where):
    def overflowing(model):
        return model.loss() + float("inf") * (model.second.reconstruct().sum() if where == "second" else model.loss())

    def loop(model):
        one_step(model)
        one_step(model, loss=overflowing)

    def optimizers(model):
        return torch.optim.SGD(model.parameters(), lr=1e-3, fused=fused)

    def fitted(name, loop):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        return logged_of(tmp_path / name, Manual(loop, optimizers), -1, max_epochs=1, plugins=plugins)

    twice, once = fitted("twice", loop), fitted("once", one_step)
    assert len(twice) == len(once) == 8
    for row, other in zip(twice, once, strict=True):
        for key in other:
            if key.startswith("norms/"):
                assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-5), key


def test_decoupled_weight_decay_is_told_by_the_setting(tmp_path):
    def predicted(name, make):
        def optimizers(model):
            return make(model.parameters())

        (row,) = logged_of(tmp_path / name, Manual(one_step, optimizers), 1, precision="64-true")
        return float(row["norms/first/predicted_rate"]), float(row["norms/first/deviation"])

    settings = {"lr": 1e-4, "weight_decay": 0.5}
    adam_w, deviation = predicted("adamw", lambda p: torch.optim.AdamW(p, **settings))
    assert adam_w == pytest.approx(-4 * 0.5 * deviation)
    assert predicted("adam", lambda p: torch.optim.Adam(p, decoupled_weight_decay=True, **settings))[0] == adam_w
    assert predicted("coupled", lambda p: torch.optim.Adam(p, **settings))[0] == 0


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["weight decay", "sam"])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_adds_up_what_goes_through_the_gradient(tmp_path, kind, dampening):
    """After a hundred steps of momentum .9 the measured rate is that of ten steps without (or five, dampened)."""
    task = {"sam": SAM(rho=0.01)} if kind == "sam" else {}
    optimizer = sgd(lr=1e-6, momentum=0.9, dampening=dampening, weight_decay=5.0 if kind == "weight decay" else 0.0)
    _, logged = monitored(tmp_path, optimizer=optimizer, fit={"max_epochs": 100}, **task)
    rates = [
        [float(row[f"norms/weight/{name}"]) for name in ("predicted_rate", "measured_rate")] for row in logged[200:]
    ]
    predicted, measured = (sum(column) / len(column) for column in zip(*rates, strict=True))
    assert abs(predicted) > 1e-4
    assert measured == pytest.approx(predicted, rel=0.05)


def test_rates_under_accumulation(tmp_path):
    _, logged = monitored(
        tmp_path, optimizer=sgd(lr=1e-3, weight_decay=0.1), accumulate_grad_batches=2, fit={"max_epochs": 3}
    )
    assert len(logged) == 6
    for row in logged:
        measured = float(row["norms/weight/measured_rate"])
        assert measured == pytest.approx(float(row["norms/weight/predicted_rate"]), rel=0.08)


@pytest.mark.parametrize("scale", [1e20, 1e-25])
def test_gradients_beyond_the_range_of_float32_squares(tmp_path, scale):
    def scaled(factor, path):
        def loop(model):
            one_step(model, loss=lambda model: factor * model.loss())

        lr = 1e-3 / factor
        (row,) = logged_of(
            path,
            Manual(loop, lambda model: torch.optim.SGD(model.parameters(), lr=lr)),
            1,
            [DeviationAwareScaling(0.1)],
        )
        return {key: float(row[f"norms/first/{key}"]) for key in QUANTITIES}

    plain, far = scaled(1.0, tmp_path / "plain"), scaled(scale, tmp_path / "far")
    # lr·g is the same, so are the steps but for the scaling's η·α·u·γ, which follows lr·g too.
    assert far["covariance"] == pytest.approx(plain["covariance"] * scale**2, rel=1e-4)
    assert far["effective_rho"] == pytest.approx(plain["effective_rho"], rel=1e-4)
    assert far["measured_rate"] == pytest.approx(plain["measured_rate"] * scale, rel=1e-3)
    assert far["predicted_rate"] == pytest.approx(plain["predicted_rate"] * scale, rel=1e-3)


def test_an_optimizer_that_steps_many_times_in_one_is_refused():
    model = Regression(optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match="first-order optimizer for NormDynamicsMonitor, got LBFGS"):
        trainer(callbacks=[NormDynamicsMonitor()]).fit(model, Batches(), Batches())


def test_nothing_stays_at_an_optimizer(tmp_path):
    for broken in (False, True):
        model = Regression(optimizer=sgd())
        stop = [StopAt(2)] if broken else []
        run = trainer(
            callbacks=[NormDynamicsMonitor(), *stop], logger=CSVLogger(tmp_path, name=str(broken)), max_epochs=1
        )
        with pytest.raises(OSError, match="stop") if broken else nullcontext():
            run.fit(model, Batches(), Batches())
        (optimizer,) = run.optimizers
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise OSError("stop")
