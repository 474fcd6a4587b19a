import csv

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor, Rebalance
from tenzoo.dynamics import effective_rho, norm_deviation, norm_gradient_covariance, squared_norms
from tenzoo.factorizations import CP, TensorTrain
from tenzoo.tasks import SAM
from tests.accelerator import Calls
from tests.tasks.toy import Batches, Regression, adam, sgd, trainer

QUANTITIES = {
    "deviation",
    "normalized_deviation",
    "covariance",
    "predicted_rate",
    "measured_rate",
    "effective_rho",
}


def rows(tmp_path):
    with (tmp_path / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("norms/weight/deviation")]


def monitored(tmp_path, *callbacks, fit=None, **task):
    """Train in float64 with a monitor; return model, log rows and the weights before each step."""
    torch.manual_seed(1)
    model = Regression(**task)
    logger = CSVLogger(tmp_path, name="", version="")
    arguments = {"max_epochs": 3, "logger": logger, "precision": "64-true", **(fit or {})}
    trainer(tmp_path, callbacks=[*callbacks, NormDynamicsMonitor()], **arguments).fit(model, Batches(), Batches())
    return model, rows(tmp_path)


@pytest.mark.parametrize("task", [{}, {"sam": SAM(rho=0.01)}], ids=["sgd", "sam"])
def test_the_prediction_is_for_the_clipped_gradient(tmp_path, task):
    _, logged = monitored(tmp_path, optimizer=sgd(lr=1e-3), gradient_clip_val=0.05, **task)
    for row in logged:
        predicted, measured = float(row["norms/weight/predicted_rate"]), float(row["norms/weight/measured_rate"])
        assert measured == pytest.approx(predicted, rel=0.1, abs=1e-9)
        assert float(row["norms/weight/effective_rho"]) <= 1e-3 * 0.05 / 2 * 1.001


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, foreach=True),
        lambda parameters: torch.optim.Rprop(parameters, lr=0.01, foreach=True),
    ],
    ids=["nesterov", "rprop"],
)
@pytest.mark.parametrize("clip", [None, "norm", "value"])
def test_gradients_are_those_before_an_optimizer_that_changes_them(tmp_path, optimizer, clip):
    class Clipped(Callback):
        """As Lightning gives them to the optimizer."""

        def __init__(self):
            self.gamma = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.zero_grad()
            pl_module.error(batch).backward()
            if clip == "norm":
                torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 0.05)
            if clip == "value":
                torch.nn.utils.clip_grad_value_(pl_module.parameters(), 0.05)
            self.gamma.append(norms_by_hand([core.grad for core in pl_module.weight.cores]))
            pl_module.zero_grad()

    seen = Clipped()
    task = {} if clip is None else {"gradient_clip_val": 0.05, "gradient_clip_algorithm": clip}
    _, logged = monitored(tmp_path, seen, optimizer=optimizer, **task)
    assert len(logged) == 12
    for row, gamma in zip(logged, seen.gamma, strict=True):
        lr = float(row["norms/weight/effective_rho"]) * 2 / sum(gamma) ** 0.5
        assert lr == pytest.approx(0.01, rel=1e-6)


def test_float32_weights_do_not_drown_the_measured_rate(tmp_path):
    class Large(Regression):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            with torch.no_grad():
                self.weight.cores[1].mul_(1e3)
                self.weight.cores[2].mul_(1e-3)

    torch.manual_seed(1)
    logger = CSVLogger(tmp_path, name="", version="")
    model = Large(optimizer=sgd(lr=1e-6, weight_decay=1.0))
    trainer(tmp_path, callbacks=[NormDynamicsMonitor()], logger=logger, max_epochs=1).fit(model, Batches(), Batches())
    for row in rows(tmp_path):
        predicted, measured = float(row["norms/weight/predicted_rate"]), float(row["norms/weight/measured_rate"])
        assert measured == pytest.approx(predicted, rel=0.02)


def test_values_are_those_of_the_formulas(tmp_path):
    seen = []

    class Recording(Regression):
        def on_before_optimizer_step(self, optimizer):
            cores = list(self.weight.cores)
            seen.append((squared_norms(cores).detach(), squared_norms([core.grad for core in cores])))

    torch.manual_seed(1)
    model = Recording(optimizer=sgd())
    logger = CSVLogger(tmp_path, name="", version="")
    fit = trainer(tmp_path, callbacks=[NormDynamicsMonitor()], max_epochs=1, logger=logger, precision="64-true")
    fit.fit(model, Batches(), Batches())
    logged = rows(tmp_path)
    assert [int(row["step"]) for row in logged] == [0, 1, 2, 3]
    assert {key.rpartition("/")[2] for key in logged[0] if key.startswith("norms/weight/")} == QUANTITIES
    assert {key.rpartition("/")[2] for key in logged[0] if key.startswith("norms/total/")} == QUANTITIES
    for row, (s, gamma) in zip(logged, seen, strict=True):
        expected = {
            "deviation": norm_deviation(s),
            "normalized_deviation": norm_deviation(s) / s.mean().square(),
            "covariance": norm_gradient_covariance(s, gamma),
            "effective_rho": effective_rho(gamma, 0.1),
        }
        for name, value in expected.items():
            assert float(row[f"norms/weight/{name}"]) == pytest.approx(value.item(), rel=1e-6)


class Many(Regression):
    """Groups of two, three and four cores, some alike; of one of them a core is frozen, and one takes no part.

    The latter is frozen too, unless asked otherwise.
    """

    def __init__(self, alike=1, *, idle=False, **kwargs):
        super().__init__(**kwargs)
        self.more = nn.ModuleList(
            [
                CP((5, 3), 2),
                TensorTrain((5, 3), 2),
                TensorTrain((5, 3, 1, 1), 2),
                *(CP((5, 3), 2) for _ in range(alike)),
            ]
        )
        self.frozen, self.idle = TensorTrain((5, 3), 1), CP((4, 4), 2)
        self.frozen.cores[0].requires_grad_(False)
        self.idle.requires_grad_(idle)

    def error(self, batch):
        hidden = self.inner(batch[0]).tanh()
        matrices = [weight.reconstruct().reshape(5, 3) for weight in (self.weight, *self.more, self.frozen)]
        return (hidden @ sum(matrices) - batch[1]).square().mean()

    def trainable_parameters(self):
        slow = list(self.more[0].parameters())
        rest = [p for p in self.parameters() if p.requires_grad and all(p is not other for other in slow)]
        return [{"params": slow, "lr": 0.001, "weight_decay": 0.1}, {"params": rest}]


def norms_by_hand(tensors):
    return [sum(float(x) ** 2 for x in tensor.detach().double().flatten()) for tensor in tensors]


def row_by_hand(before, after, gamma, lr, decay, rho, norm):
    """The formulas of one group, on lists of floats."""

    def mean(values):
        return sum(values) / len(values)

    def deviation(values):
        return sum((value - mean(values)) ** 2 for value in values)

    covariance = mean([(s - mean(before)) * (g - mean(gamma)) for s, g in zip(before, gamma, strict=True)])
    own = sum(gamma) ** 0.5
    # Of plain SGD's finite step the radius is η‖g‖/2, so that its ρu is η/2.
    strength = lr / 2 + (0.0 if rho is None else rho / norm)
    return {
        "deviation": deviation(before),
        "normalized_deviation": deviation(before) / mean(before) ** 2,
        "covariance": covariance,
        "predicted_rate": 4 * len(before) * strength * covariance - 4 * decay * deviation(before),
        "measured_rate": (deviation(after) - deviation(before)) / lr,
        "effective_rho": lr * own / 2,
    }


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("rho", [None, 0.02])
def test_of_several_groups_each_is_judged_by_itself(tmp_path, rho, idle):
    """Groups of one kind are computed with together; values are those of each alone, in plain floats."""
    kept = {}

    class Recorder(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            kept["before"] = {name: norms_by_hand(cores) for name, cores in groups(pl_module).items()}
            pl_module.error(batch).backward()
            every = [p.grad for p in pl_module.parameters() if p.grad is not None]
            kept["norm"] = sum(norms_by_hand(every)) ** 0.5
            kept["gamma"] = {
                name: norms_by_hand([core.grad for core in cores])
                for name, cores in groups(pl_module).items()
                if name != "idle"
            }
            pl_module.zero_grad()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept["after"] = {name: norms_by_hand(cores) for name, cores in groups(pl_module).items()}

    def groups(model):
        found = {group.name: [core for core in group.cores if core.requires_grad] for group in model.core_groups()}
        return {name: cores for name, cores in found.items() if cores}

    torch.manual_seed(1)
    model = Many(idle=idle, optimizer=sgd(), sam=None if rho is None else SAM(rho=rho))
    arguments = {"precision": "64-true", "max_steps": 1, "logger": CSVLogger(tmp_path, name="", version="")}
    trainer(callbacks=[Recorder(), NormDynamicsMonitor()], **arguments).fit(model, Batches(), Batches())
    (logged,) = rows(tmp_path)
    names = {key.split("/")[1] for key in logged if key.startswith("norms/")}
    assert names == ({*kept["gamma"]} if idle else {"total", *kept["gamma"]})  # of all trained groups, or none
    assert {len(gamma) for gamma in kept["gamma"].values()} == {1, 2, 3, 4}
    expected = {}
    for name, gamma in kept["gamma"].items():
        lr, decay = (0.001, 0.1) if name == "more.0" else (0.1, 0.0)
        expected[name] = row_by_hand(kept["before"][name], kept["after"][name], gamma, lr, decay, rho, kept["norm"])
        for key, value in expected[name].items():
            assert float(logged[f"norms/{name}/{key}"]) == pytest.approx(value, rel=1e-6, abs=1e-9), (name, key)
    if idle:
        return
    for key in ("deviation", "covariance"):
        total = sum(row[key] for row in expected.values())
        assert float(logged[f"norms/total/{key}"]) == pytest.approx(total, rel=1e-6, abs=1e-9)
    means = [sum(kept["before"][name]) / len(kept["before"][name]) for name in expected]
    normalized = sum(row["deviation"] for row in expected.values()) / sum(mean**2 for mean in means)
    assert float(logged["norms/total/normalized_deviation"]) == pytest.approx(normalized)
    assert "norms/total/measured_rate" not in logged  # of groups with different learning rates


def test_the_number_of_operations_does_not_follow_that_of_groups(tmp_path):
    counts = []
    for alike in (1, 12):
        calls = Calls()

        class Counted(NormDynamicsMonitor):
            def on_train_batch_start(self, *args, calls=calls):
                with calls:
                    super().on_train_batch_start(*args)

            def on_before_optimizer_step(self, *args, calls=calls):
                with calls:
                    super().on_before_optimizer_step(*args)

            def on_train_batch_end(self, *args, calls=calls):
                with calls:
                    super().on_train_batch_end(*args)

        logger = CSVLogger(tmp_path / str(alike), name="", version="")
        fit = trainer(callbacks=[Counted()], max_steps=1, logger=logger)
        fit.fit(Many(alike=alike, optimizer=sgd()), Batches(), Batches())
        counts.append(len(calls.operations()))
    assert counts[0] == counts[1]
    assert counts[0] < 400


@pytest.mark.parametrize("method", ["sgd", "sam", "das", "das global", "weight decay"])
def test_the_measured_rate_follows_the_predicted_one(tmp_path, method):
    """Small steps and radii: first-order theory holds to a few percent, for every method."""
    task = {"optimizer": sgd(lr=1e-3)}
    callbacks = []
    match method:
        case "sam":
            task["sam"] = {"rho": 1e-2}
        case "das":
            callbacks = [DeviationAwareScaling(0.05)]
        case "das global":
            callbacks = [DeviationAwareScaling(0.05, normalizer="global")]
        case "weight decay":
            task["optimizer"] = sgd(lr=1e-3, weight_decay=0.1)
    _, logged = monitored(tmp_path, *callbacks, **task)
    assert len(logged) == 12
    for row in logged:
        predicted, measured = float(row["norms/weight/predicted_rate"]), float(row["norms/weight/measured_rate"])
        assert measured == pytest.approx(predicted, rel=0.08, abs=1e-6)
        assert float(row["norms/total/predicted_rate"]) == pytest.approx(predicted)
    assert max(abs(float(row["norms/weight/predicted_rate"])) for row in logged) > 1e-5


def test_the_order_of_callbacks_does_not_matter(tmp_path):
    logged = []
    for order in (1, -1):
        torch.manual_seed(1)
        path = tmp_path / str(order)
        callbacks = [DeviationAwareScaling(0.5), NormDynamicsMonitor()][::order]
        logger = CSVLogger(path, name="", version="")
        trainer(path, callbacks=callbacks, logger=logger).fit(Regression(optimizer=sgd()), Batches(), Batches())
        logged.append(rows(path))
    assert logged[0] == logged[1]


def test_under_sam_gradients_are_those_at_the_unperturbed_weights(tmp_path):
    values = []
    for number, sam in enumerate((None, {"rho": 5.0})):
        path = tmp_path / str(number)
        _, logged = monitored(path, optimizer=sgd(lr=1e-9), sam=sam, fit={"max_epochs": 1})
        values.append([float(logged[0][f"norms/weight/{name}"]) for name in ("covariance", "effective_rho")])
    assert values[0] == pytest.approx(values[1], rel=1e-9)


class ByHand(Callback):
    """Squared norms of the cores that are trained, before and after each step, and the learning rates of the step."""

    def __init__(self):
        self.before, self.gamma, self.after, self.rates = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.cores = [core for core in pl_module.weight.cores if core.requires_grad]
        self.before.append(norms_by_hand(self.cores))
        self.gamma.append(norms_by_hand([core.grad for core in self.cores]))
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def on_train_batch_end(self, *args):
        self.after.append(norms_by_hand(self.cores))


@pytest.mark.parametrize("kind", ["plain", "tensor", "sam"])
def test_rates_are_those_of_the_step_whatever_a_scheduler_does_after_it(tmp_path, kind):
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=torch.tensor(0.1) if kind == "tensor" else 0.1)

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 2 else 0.3**step)

    seen = ByHand()
    task = {"lr_scheduler": schedule, "lr_scheduler_interval": "step", "sam": SAM(rho=0.01) if kind == "sam" else None}
    _, logged = monitored(tmp_path, seen, optimizer=optimizer, fit={"max_epochs": 1}, **task)
    assert [rates[0] for rates in seen.rates] == pytest.approx([0.1, 0.03, 0.0, 0.0027])
    for row, before, after, gamma, (lr,) in zip(logged, seen.before, seen.after, seen.gamma, seen.rates, strict=True):
        if lr == 0:
            assert not any(row[f"norms/weight/{key}"] for key in ("predicted_rate", "measured_rate", "effective_rho"))
            continue
        q = [norm_deviation(torch.tensor(s, dtype=torch.float64)).item() for s in (before, after)]
        moved = (q[1] - q[0]) / lr
        assert float(row["norms/weight/measured_rate"]) == pytest.approx(moved, rel=1e-6, abs=1e-9)
        if kind != "sam":
            assert float(row["norms/weight/effective_rho"]) == pytest.approx(lr * sum(gamma) ** 0.5 / 2)


def test_no_rate_is_logged_for_cores_with_different_ones(tmp_path):
    class Split(Regression):
        def trainable_parameters(self):
            first, *rest = self.weight.cores
            return [{"params": [first], "lr": 0.01}, {"params": [*rest, *self.inner.parameters()]}]

    torch.manual_seed(1)
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(callbacks=[NormDynamicsMonitor()], logger=logger, max_steps=1)
    run.fit(Split(optimizer=sgd()), Batches(), Batches())
    (row,) = rows(tmp_path)
    assert {key for key in QUANTITIES if f"norms/weight/{key}" in row} == {
        "deviation",
        "normalized_deviation",
        "covariance",
    }


class Alternating(Callback):
    """Trains one core of three in turn less."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for number, core in enumerate(pl_module.weight.cores):
            core.requires_grad_(number != batch_idx % 3)


@pytest.mark.parametrize("first", [True, False])
def test_frozen_cores_are_left_out_in_the_very_step(tmp_path, first):
    seen, alternating = ByHand(), Alternating()
    before = [alternating, seen] if first else [seen]
    torch.manual_seed(1)
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = [*before, NormDynamicsMonitor(), *([] if first else [alternating])]
    run = trainer(tmp_path, callbacks=callbacks, logger=logger, max_epochs=1, precision="64-true")
    run.fit(Regression(optimizer=sgd()), Batches(), Batches())
    logged = rows(tmp_path)
    assert len(logged) == 4
    for row, before, gamma in zip(logged, seen.before, seen.gamma, strict=True):
        s = torch.tensor(before, dtype=torch.float64)
        assert len(before) == 2
        assert float(row["norms/weight/deviation"]) == pytest.approx(norm_deviation(s).item())
        covariance = norm_gradient_covariance(s, torch.tensor(gamma, dtype=torch.float64)).item()
        assert float(row["norms/weight/covariance"]) == pytest.approx(covariance)


def test_only_steps_that_are_logged_are_computed(tmp_path):
    _, logged = monitored(tmp_path, optimizer=adam(), fit={"log_every_n_steps": 3, "max_epochs": 3})
    assert [int(row["step"]) for row in logged] == [2, 5, 8, 11]


def test_a_model_without_cores_is_refused():
    class Plain(Regression):
        def __init__(self):
            super().__init__()
            self.weight = nn.Linear(3, 5)

        def error(self, batch):
            return self.inner(batch[0]).sum()

    for callback in (NormDynamicsMonitor(), Rebalance()):
        with pytest.raises(ValueError, match=f"core groups for {type(callback).__name__}, found none in Plain"):
            trainer(callbacks=[callback]).fit(Plain(), Batches(), Batches())


def test_rebalancing_happens_once_and_keeps_the_tensor(tmp_path):
    class Check(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                s = squared_norms([core.detach() for core in pl_module.weight.cores])
                torch.testing.assert_close(s, s.mean().expand(3))
                torch.testing.assert_close(pl_module.weight.reconstruct().detach(), before)
                checked.append(True)

    checked = []
    torch.manual_seed(1)
    model = Regression(optimizer=sgd())
    before = model.weight.reconstruct().detach().clone()
    fit = trainer(callbacks=[Rebalance(), Check()], max_epochs=1)
    fit.fit(model, Batches(), Batches())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    assert checked == [True]
    last = [core.detach().clone() for core in model.weight.cores]
    trainer(callbacks=[Rebalance()], max_epochs=1).fit(model, Batches(), Batches(), ckpt_path=tmp_path / "x.ckpt")
    assert all(core.equal(old) for core, old in zip(model.weight.cores, last, strict=True))


def test_rebalancing_leaves_frozen_cores():
    torch.manual_seed(1)
    model = Regression(optimizer=sgd(0.0))
    frozen, *others = model.weight.cores
    frozen.requires_grad_(False)
    before, tensor = frozen.detach().clone(), model.weight.reconstruct().detach().clone()
    trainer(callbacks=[Rebalance()], max_epochs=1).fit(model, Batches(), Batches())
    assert frozen.equal(before)
    one, two = squared_norms([core.detach() for core in others])
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(model.weight.reconstruct().detach(), tensor)
