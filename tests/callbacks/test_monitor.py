import csv
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor, Rebalance
from tenzoo.dynamics import effective_rho, norm_deviation, norm_gradient_covariance, squared_norms
from tenzoo.factorizations import CP, TensorTrain
from tenzoo.tasks import SAM
from tests.accelerator import Calls
from tests.tasks.toy import Batches, Regression, adam, fitted, sgd, trainer

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
    """Groups of two, three and four cores, some alike; of one of them a core is frozen, and one takes no part."""

    def __init__(self, alike=1, **kwargs):
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


@pytest.mark.parametrize("rho", [None, 0.02])
def test_of_several_groups_each_is_judged_by_itself(tmp_path, rho):
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
    model = Many(optimizer=sgd(), sam=None if rho is None else SAM(rho=rho))
    arguments = {"precision": "64-true", "max_steps": 1, "logger": CSVLogger(tmp_path, name="", version="")}
    trainer(callbacks=[Recorder(), NormDynamicsMonitor()], **arguments).fit(model, Batches(), Batches())
    (logged,) = rows(tmp_path)
    names = {key.split("/")[1] for key in logged if key.startswith("norms/")}
    assert names == {"total", *kept["gamma"]}
    assert {len(gamma) for gamma in kept["gamma"].values()} == {1, 2, 3, 4}
    expected = {}
    for name, gamma in kept["gamma"].items():
        lr, decay = (0.001, 0.1) if name == "more.0" else (0.1, 0.0)
        expected[name] = row_by_hand(kept["before"][name], kept["after"][name], gamma, lr, decay, rho, kept["norm"])
        for key, value in expected[name].items():
            assert float(logged[f"norms/{name}/{key}"]) == pytest.approx(value, rel=1e-6, abs=1e-9), (name, key)
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


def test_a_group_that_is_frozen_midway_keeps_its_place_in_the_figure():
    class Freeze(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                pl_module.weight.requires_grad_(False)

    monitor = NormDynamicsMonitor()
    torch.manual_seed(1)
    model = Many(optimizer=sgd())
    trainer(callbacks=[Freeze(), monitor], max_epochs=1).fit(model, Batches(), Batches())
    other = NormDynamicsMonitor()
    other.load_state_dict(monitor.state_dict())
    lines = {line.get_label(): list(line.get_xdata()) for line in other.figure().axes[0].get_lines()}
    assert lines["weight"] == [1, 2]
    assert lines["more.0"] == [1, 2, 3, 4]


def test_histories_of_older_checkpoints_are_read():
    monitor = NormDynamicsMonitor()
    monitor.load_state_dict({"steps": [1, 2, 3], "history": {"weight": [(1.0, 0.1), (2.0, 0.2)], "total": []}})
    assert monitor.state_dict() == {"history": {"weight": [(2, 1.0, 0.1), (3, 2.0, 0.2)], "total": []}}


def test_only_steps_that_are_logged_are_computed(tmp_path):
    _, logged = monitored(tmp_path, optimizer=adam(), fit={"log_every_n_steps": 3, "max_epochs": 3})
    assert [int(row["step"]) for row in logged] == [2, 5, 8, 11]


def test_a_figure_is_drawn_at_the_end(tmp_path):
    monitored(tmp_path, optimizer=adam())
    assert (tmp_path / "norm_dynamics.png").stat().st_size > 10_000


def test_the_history_survives_a_checkpoint():
    monitor = NormDynamicsMonitor()
    fitted(callbacks=[monitor], optimizer=sgd(), fit={"max_epochs": 1})
    other = NormDynamicsMonitor()
    other.load_state_dict(monitor.state_dict())
    lines = other.figure().axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["weight"]
    assert list(lines[0].get_xdata()) == [1, 2, 3, 4]


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
    with (tmp_path / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("norms/first/deviation")]


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
    with (tmp_path / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row.get("norms/first/deviation")]
    assert [int(row["step"]) for row in logged] == [0, 2]
    assert all(value == value for rows in monitor.state_dict()["history"].values() for row in rows for value in row)


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


def test_a_resume_goes_on_with_the_history_amid_freezing(tmp_path):
    def run(path, epochs, ckpt_path=None):
        torch.manual_seed(1)
        monitor, model = NormDynamicsMonitor(), Regression(optimizer=sgd())
        fit = trainer(
            path, callbacks=[Alternating(), monitor], logger=CSVLogger(path, name="", version=""), max_epochs=epochs
        )
        fit.fit(model, Batches(), Batches(), ckpt_path=ckpt_path)
        return fit, monitor.state_dict()

    first, _ = run(tmp_path / "first", 2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(tmp_path / "resumed", 4, tmp_path / "half.ckpt")
    _, whole = run(tmp_path / "whole", 4)
    assert len(whole["history"]["weight"]) == 16
    assert resumed == whole


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
        assert not optimizer._optimizer_step_post_hooks


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise OSError("stop")
