"""What the monitor says of SAM: gradients are those at the unperturbed weights, of all batches that a step takes."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor
from tenzoo.dynamics import norm_deviation, norm_gradient_covariance, sam_deviation_rate, squared_norms
from tenzoo.tasks import SAM
from tests.tasks.toy import Batches, Regression, sgd, trainer


def logged_of(tmp_path, model, batches, *callbacks, **fit):
    logger = CSVLogger(tmp_path, name="", version="")
    arguments = {"logger": logger, "max_epochs": 1, "precision": "64-true", **fit}
    trainer(callbacks=[*callbacks, NormDynamicsMonitor()], **arguments).fit(model, batches, batches)
    with (tmp_path / "metrics.csv").open() as file:
        return [
            {key.rpartition("/")[2]: float(row[key]) for key in row if key.startswith("norms/weight/") and row[key]}
            for row in csv.DictReader(file)
            if row.get("norms/weight/deviation")
        ]


def gradients(model, batch, scale=1.0):
    """Of each parameter, at the weights as they are."""
    model.zero_grad()
    (scale * model.error(batch)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def norms(model, tensors):
    return squared_norms([tensors[name] for name, _ in model.named_parameters() if name.startswith("weight.")])


def regression(**task):
    torch.manual_seed(1)
    model = Regression(**task).double()
    with torch.no_grad():
        model.weight.cores[1].mul_(2.0)
    return model


def batches(count):
    found = Batches(count=count)
    # The third pulls the other way: the mean gradient is none of the batches' own.
    found.batches = [
        (x.double(), (-4.0 if number == 2 else 1.0) * y.double()) for number, (x, y) in enumerate(found.batches)
    ]
    return found


@pytest.mark.parametrize("scope", ["all", "cores"])
@pytest.mark.parametrize("count", [4, 3])  # 3: the epoch ends within the window
def test_under_accumulation_gradients_are_the_mean_of_those_of_the_batches(tmp_path, scope, count):
    rho, lr = 0.002, 1e-3
    model = regression(optimizer=sgd(lr=lr), sam=SAM(rho=rho, scope=scope), accumulate_grad_batches=4)
    data = batches(count)
    of_batches = [gradients(model, batch) for batch in data.batches]
    s = norms(model, {name: p.detach() for name, p in model.named_parameters()})
    mean = {name: sum(each[name] for each in of_batches) / count for name in of_batches[0]}
    gamma = norms(model, mean)
    rate = sam_deviation_rate(s, gamma, rho=lr * gamma.sum().sqrt() / 2)  # of plain SGD's own step
    for each in of_batches:  # each batch climbs by itself
        climbed = list(each.values()) if scope == "all" else [each[name] for name in each if name.startswith("weight")]
        rate = (
            rate + sam_deviation_rate(s, norms(model, each), rho, grad_norm=squared_norms(climbed).sum().sqrt()) / count
        )
    (row,) = logged_of(tmp_path, model, data)
    assert row["deviation"] == pytest.approx(norm_deviation(s).item())
    assert row["covariance"] == pytest.approx(norm_gradient_covariance(s, gamma).item())
    assert row["effective_rho"] == pytest.approx(lr * gamma.sum().sqrt().item() / 2)
    assert row["predicted_rate"] == pytest.approx(rate.item())
    assert row["measured_rate"] == pytest.approx(row["predicted_rate"], rel=0.1)


def test_a_gradient_that_some_batches_do_not_have_counts_as_zero_there():

    class Partly(Regression):
        def error(self, batch):
            hidden = self.inner(batch[0]) if batch[1].sum() > 0 else batch[0][:, :5]
            return (hidden.tanh() @ self.weight.reconstruct() - batch[1]).square().mean()

    torch.manual_seed(1)
    model = Partly(optimizer=sgd(lr=1e-3), sam=SAM(rho=0.02), accumulate_grad_batches=4).double()
    data = batches(4)
    of_batches = [gradients(model, batch) for batch in data.batches]
    assert {len(each) for each in of_batches} == {3, 5}
    expected = {
        name: squared_norms([sum(each[name] for each in of_batches if name in each) / 4])
        for name, _ in model.named_parameters()
    }
    trainer(max_epochs=1, precision="64-true").fit(model, data, data)
    state = model.sharpness_state
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state.squared_grad_norms_of([parameter]), expected[name])


def test_the_loss_scale_is_divided_out():
    states = []
    for scale in (1.0, 8.0):
        torch.manual_seed(1)
        model = Regression(optimizer=sgd(lr=1e-3), sam=SAM(rho=0.02), accumulate_grad_batches=4)
        plugins = [MixedPrecision("bf16-mixed", "cpu")]
        plugins[0].scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer(max_epochs=1, plugins=plugins).fit(model, Batches(), Batches())
        state = model.sharpness_state
        states.append([values(list(model.weight.cores)) for values in (state.squared_grad_norms_of, state.steering_of)])
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("normalizer", ["group", "global"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_das_adds_follows_the_gradients_that_it_takes(tmp_path, normalizer, accumulate):
    """Beside so strong a SAM that gradients at the perturbed weights are others; the small rate makes it exact."""
    task = {"optimizer": sgd(lr=1e-6), "sam": SAM(rho=1.0), "accumulate_grad_batches": accumulate}
    rows = {}
    for alpha in (0.0, 0.5):
        das = DeviationAwareScaling(alpha, normalizer=normalizer)
        rows[alpha], *_ = logged_of(tmp_path / str(alpha), regression(**task), batches(4), das)
    predicted, measured = (rows[0.5][key] - rows[0.0][key] for key in ("predicted_rate", "measured_rate"))
    assert abs(measured) > 1e-2
    assert predicted == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rates_of_das_under_plain_accumulation(tmp_path, accumulate):
    task = {"optimizer": sgd(lr=1e-5), "accumulate_grad_batches": accumulate}
    for row in logged_of(tmp_path, regression(**task), batches(4), DeviationAwareScaling(0.5)):
        assert row["measured_rate"] == pytest.approx(row["predicted_rate"], rel=1e-2)
