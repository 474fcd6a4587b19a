"""What the monitor makes of each optimizer, and of groups that belong to several."""

import inspect

import pytest
import torch
from torch.optim import Optimizer

from tests.callbacks.test_monitor_steps import Manual, logged_of, one_step

OPTIMIZERS = {
    name: each
    for name, each in vars(torch.optim).items()
    if inspect.isclass(each) and issubclass(each, Optimizer) and each is not Optimizer
}
DECAYS = {
    "SGD": [{}, {"nesterov": True, "momentum": 0.5}, {"maximize": True}],
    "AdamW": [{}, {"foreach": True}, {"amsgrad": True}],
    "Adam": [{"decoupled_weight_decay": True}],
    "NAdam": [{"decoupled_weight_decay": True}],
    "RAdam": [{"decoupled_weight_decay": True}],
    "Adafactor": [{}, {"foreach": True}],
    "Muon": [{}],
}
"""Of optimizers whose weight decay shrinks the weights by the learning rate times itself."""
BY_THE_GRADIENT = {"Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "ASGD"}
"""Those in which it goes through what they make of the gradient, with their defaults."""
WITHOUT = {"Rprop", "SparseAdam", "LBFGS"}


def test_every_optimizer_of_torch_is_in_one_of_the_tables():
    assert OPTIMIZERS.keys() <= DECAYS.keys() | BY_THE_GRADIENT | WITHOUT
    for name in WITHOUT & OPTIMIZERS.keys():
        assert "weight_decay" not in inspect.signature(OPTIMIZERS[name]).parameters


def rates(tmp_path, name, **settings):
    """Of one step with gradients of 0, predicted and measured."""

    def optimizers(model):
        return OPTIMIZERS[name](model.parameters(), lr=1e-5, weight_decay=0.5, **settings)

    def loop(model):
        one_step(model, loss=lambda model: 0 * model.loss())

    (row,) = logged_of(tmp_path, Manual(loop, optimizers), 1, precision="64-true")
    return [float(row[f"norms/first/{key}"]) for key in ("predicted_rate", "measured_rate")]


@pytest.mark.parametrize(
    ("name", "settings"), [(name, each) for name, choices in DECAYS.items() for each in choices if name in OPTIMIZERS]
)
def test_decay_by_the_learning_rate_is_predicted(tmp_path, name, settings):
    predicted, measured = rates(tmp_path, name, **settings)
    if "momentum" in settings:
        predicted *= 0.5 * 1.5  # of the first step: 1/(1 − β) is that of many, and 1 + β that of Nesterov's first
    assert abs(measured) > 1
    assert predicted == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("name", sorted(BY_THE_GRADIENT))
def test_decay_by_the_gradient_is_left_to_the_measured_rate(tmp_path, name):
    predicted, measured = rates(tmp_path, name)
    assert predicted == 0
    assert measured != 0
