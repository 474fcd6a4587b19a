"""Metrics that a loss updates count the first of SAM's passes, whatever they keep and however they are used."""

import inspect
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import (
    ConfusionMatrix,
    MeanAbsoluteError,
    MeanMetric,
    MeanSquaredError,
    Metric,
    MetricCollection,
    PearsonCorrCoef,
    R2Score,
    SumMetric,
    aggregation,
    wrappers,
)
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from tenzoo.tasks import SAM
from tests.tasks.toy import Batches, Regression, assert_same_weights, sgd, trainer


class Featured(Metric):
    """Runs a network that several metrics share."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(3, 2).requires_grad_(False)
        self.feature_network = "network"
        self.add_state("total", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, output, y):
        self.total += self.network(output).sum(0)

    def compute(self):
        return self.total


class Squared(wrappers.MetricInputTransformer):
    def transform_pred(self, pred):
        return pred.square()


def by_value(metric, output, y, loss):
    metric.update(loss)


def by_pair(metric, output, y, loss):
    metric.update(output, y)


def by_forward(metric, output, y, loss):
    metric(output, y)


def by_column(metric, output, y, loss):
    metric.update(output[:, 0], y[:, 0])


def by_class(metric, output, y, loss):
    metric.update(output, y.argmax(1))


def by_labels(metric, output, y, loss):
    metric.update(output.argmax(1), y.argmax(1))


def by_task(metric, output, y, loss):
    metric.update({"one": output, "two": output}, {"one": y, "two": y})


def by_increment(metric, output, y, loss):
    metric.increment()
    metric.update(output, y)
    metric.update(output, y)


def after_reset(metric, output, y, loss):
    metric.reset()
    metric.update(output, y)


def with_value(metric, output, y, loss):
    metric(output, y)
    metric.compute()


def collection():
    return MetricCollection({"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "same": MeanSquaredError()})


CLASSES = {
    aggregation.BaseAggregator: [(lambda: aggregation.BaseAggregator("sum", torch.tensor(0.0)), None)],
    aggregation.SumMetric: [(SumMetric, by_value)],
    aggregation.MeanMetric: [(MeanMetric, by_value)],
    aggregation.MaxMetric: [(aggregation.MaxMetric, by_value)],
    aggregation.MinMetric: [(aggregation.MinMetric, by_value)],
    aggregation.CatMetric: [(aggregation.CatMetric, by_value)],
    aggregation.RunningMean: [(lambda: aggregation.RunningMean(window=4), by_value)],
    aggregation.RunningSum: [(lambda: aggregation.RunningSum(window=4), by_value)],
    wrappers.Running: [(lambda: wrappers.Running(MeanSquaredError(), 4), by) for by in (by_pair, by_forward)],
    wrappers.BootStrapper: [(lambda: wrappers.BootStrapper(MeanSquaredError(), num_bootstraps=3), by_pair)],
    wrappers.ClasswiseWrapper: [
        (lambda: wrappers.ClasswiseWrapper(MulticlassAccuracy(3, average=None)), by_class),
    ],
    wrappers.MinMaxMetric: [(lambda: wrappers.MinMaxMetric(MeanSquaredError()), by) for by in (by_forward, with_value)],
    wrappers.MultioutputWrapper: [(lambda: wrappers.MultioutputWrapper(R2Score(), 3), by_pair)],
    wrappers.MultitaskWrapper: [
        (lambda: wrappers.MultitaskWrapper({"one": MeanSquaredError(), "two": MeanAbsoluteError()}), by_task)
    ],
    wrappers.MetricTracker: [
        (lambda: wrappers.MetricTracker(MeanSquaredError(), maximize=False), by_increment),
        (lambda: wrappers.MetricTracker(collection(), maximize=[False] * 3), by_increment),
    ],
    wrappers.FeatureShare: [(lambda: wrappers.FeatureShare({"one": Featured(), "two": Featured()}), by_pair)],
    wrappers.LambdaInputTransformer: [
        (lambda: wrappers.LambdaInputTransformer(MeanSquaredError(), torch.square), by_pair)
    ],
    wrappers.MetricInputTransformer: [(lambda: Squared(MeanSquaredError()), by_pair)],
    wrappers.BinaryTargetTransformer: [(lambda: wrappers.BinaryTargetTransformer(MeanSquaredError(), 0.0), by_pair)],
    # Beside those of wrappers and aggregation:
    MetricCollection: [(collection, by) for by in (by_pair, by_forward, after_reset, with_value)],
    MeanSquaredError: [(MeanSquaredError, by) for by in (by_forward, after_reset, with_value)],
    PearsonCorrCoef: [(PearsonCorrCoef, by_column)],
    MulticlassAccuracy: [(lambda: MulticlassAccuracy(3), by_class)],
    MulticlassF1Score: [(lambda: MulticlassF1Score(3), by_class)],
    MulticlassAUROC: [(lambda: MulticlassAUROC(3), by_class), (lambda: MulticlassAUROC(3, thresholds=9), by_class)],
    ConfusionMatrix: [(lambda: ConfusionMatrix(task="multiclass", num_classes=600), by_labels)],  # too large to rewind
}
USES = [
    pytest.param(make, by, id=f"{cls.__name__}-{by.__name__}")
    for cls, uses in CLASSES.items()
    for make, by in uses
    if by
]


def test_every_wrapper_and_aggregation_is_among_them():
    exported = {getattr(wrappers, name) for name in wrappers.__all__}
    exported |= {
        cls
        for _, cls in inspect.getmembers(aggregation, inspect.isclass)
        if issubclass(cls, Metric) and cls.__module__ == aggregation.__name__
    }
    assert len(exported) >= 19
    assert exported <= CLASSES.keys()


def state(thing):
    """All that a metric holds, as something that can be compared."""
    if isinstance(thing, torch.Tensor | np.ndarray):
        return str(thing.dtype), thing.tolist()
    if isinstance(thing, nn.Module):
        own = {name: value for name, value in vars(thing).items() if not name.startswith(("_parameters", "_load"))}
        return type(thing).__name__, state(own)
    if isinstance(thing, dict):
        return {name: state(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple | deque):
        return [state(value) for value in thing]
    return thing if isinstance(thing, int | float | str | None) else type(thing).__name__


class Measured(Regression):
    def __init__(self, make, use, *, only_first=False, **kwargs):
        super().__init__(**kwargs)
        self.metric, self._use, self._only_first = make(), use, only_first

    def loss(self, batch, batch_idx):
        x, y = batch
        output = self.inner(x).tanh() @ self.weight.reconstruct()
        loss = (output - y).square().mean()
        if not self._only_first or not self.perturbed:
            self._use(self.metric, output.detach(), y, loss.detach())
        return loss


def measured(make, use, sam, **kwargs):
    torch.manual_seed(1)
    model = Measured(make, use, optimizer=sgd(), sam=sam, **kwargs)
    trainer(max_epochs=1).fit(model, Batches(count=3), Batches())
    return model


@pytest.mark.sampled(6)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize(("make", "use"), USES)
def test_metrics_count_the_first_pass_once(make, use):
    plain, sam = measured(make, use, None), measured(make, use, SAM(rho=0))
    assert_same_weights(plain, sam)
    assert state(sam.metric) == state(plain.metric)
    if not isinstance(sam.metric, wrappers.BootStrapper):  # which draws once more here
        known = measured(make, use, SAM(rho=0.5), only_first=True)
        found = measured(make, use, SAM(rho=0.5))
        assert_same_weights(known, found)
        assert state(found.metric) == state(known.metric)


@pytest.mark.parametrize("made", ["in each pass", "in the first batch", "in a list"])
def test_metrics_that_a_loss_makes_count_once(made):
    class Making(Regression):
        def loss(self, batch, batch_idx):
            loss = super().loss(batch, batch_idx)
            if made == "in each pass" or not hasattr(self, "made"):
                self.made = [SumMetric()] if made == "in a list" else SumMetric()
            (self.made[0] if made == "in a list" else self.made).update(loss.detach())
            return loss

    models = []
    for sam in (None, SAM(rho=0)):
        torch.manual_seed(1)
        models.append(Making(optimizer=sgd(), sam=sam))
        trainer(max_epochs=1).fit(models[-1], Batches(count=3), Batches())
    assert state(models[1].made) == state(models[0].made)


def test_a_loss_may_read_what_a_metric_has_seen():
    """The second pass sees what the first one saw: it does not find itself counted already."""

    def normalized(metric, sam):
        class Normalized(Regression):
            def loss(self, batch, batch_idx):
                loss = super().loss(batch, batch_idx)
                self.scale.update(loss.detach())
                return loss / self.scale.compute()

        torch.manual_seed(1)
        model = Normalized(optimizer=sgd(), accumulate_grad_batches=2, sam=sam)
        model.scale = metric()
        trainer(max_epochs=2).fit(model, Batches(), Batches())
        return model

    for metric in (SumMetric, aggregation.RunningSum):
        assert_same_weights(normalized(metric, None), normalized(metric, SAM(rho=0)))


def test_a_task_that_asks_may_measure_the_second_pass():
    class Asking(Regression):
        def loss(self, batch, batch_idx):
            loss = super().loss(batch, batch_idx)
            (self.second if self.perturbed else self.first).update(loss.detach())
            self.both.update(loss.detach())
            return loss

    model = Asking(optimizer=sgd(), sam=SAM(rho=0.5))
    model.first, model.second, model.both = SumMetric(), SumMetric(), SumMetric()
    trainer(max_epochs=1).fit(model, Batches(count=3), Batches())
    assert (model.first.update_count, model.second.update_count, model.both.update_count) == (3, 3, 3)
    assert model.second.compute() > model.first.compute()
    assert model.both.compute() == model.first.compute()
