"""A plan keeps what it decomposed: nothing is decomposed or measured twice, and nothing is shared."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

from tenzoo.compression import Plan, apply_, plan
from tenzoo.compression.metrics import output_metrics
from tenzoo.factorizations import Factorization
from tenzoo.layers import TensorizedLayer, TensorizedWeight
from tests.factorizations.formats import NAMES


class Mixed(nn.Module):
    """Weights in layers, one with padding, and weights that stay parameters."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.rnn = nn.Embedding(40, 16, padding_idx=0), nn.GRU(16, 16, batch_first=True)
        self.convolution, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(16 * 8, 12)

    def forward(self, x):
        y = self.rnn(self.embedding(x))[0]
        return self.head(self.convolution(y[:, None]).mean(2).flatten(1))


TOKENS = torch.randint(40, (16, 5), generator=torch.Generator().manual_seed(0))
CALIBRATION = pytest.mark.parametrize("calibration", [None, TOKENS], ids=["plain", "calibrated"])


@pytest.fixture
def decomposed(monkeypatch):
    """What is decomposed: the tensor, the rank and the metric of each call."""
    calls, decompose = [], Factorization.decompose.__func__

    def recorded(cls, tensor, rank, *, metric=None):
        numbers = [tensor, *(metric or {}).values()]
        calls.append((cls, rank, *(number.double().norm().item() for number in numbers)))
        return decompose(cls, tensor, rank, metric=metric)

    monkeypatch.setattr(Factorization, "decompose", classmethod(recorded))
    return calls


@pytest.fixture
def measured(monkeypatch):
    """The layers whose inputs are measured, of each call."""
    calls = []

    def recorded(model, layers, inputs):
        calls.append(list(layers))
        return output_metrics(model, layers, inputs)

    for module in ("calibrate", "apply"):
        monkeypatch.setattr(f"tenzoo.compression.{module}.output_metrics", recorded)
    return calls


def loaded(made, tmp_path):
    made.save(tmp_path / "plan.json")
    return Plan.load(tmp_path / "plan.json")


def assert_same(model, other):
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(value.equal(others[name]) for name, value in weights.items())


@pytest.mark.sampled(3)
@CALIBRATION
@pytest.mark.parametrize("settings", [{"budget": 0.6}, {"ranks": 3}], ids=["budget", "ranks"])
@pytest.mark.parametrize("factorization", NAMES)
def test_nothing_is_decomposed_or_measured_twice(factorization, settings, calibration, decomposed, measured, tmp_path):
    model = Mixed()
    made = plan(model, factorization=factorization, calibration=calibration, **settings)
    assert len(decomposed) == len(set(decomposed)) > 0
    assert len(measured) == (calibration is not None)
    before = list(decomposed), list(measured)
    small = apply_(copy.deepcopy(model), made, calibration=calibration)
    assert (decomposed, measured) == before
    assert_same(small, apply_(model, loaded(made, tmp_path), calibration=calibration))
    assert len(decomposed) == len(before[0]) + sum(layer.rank is not None for layer in made.layers)


@CALIBRATION
def test_other_weights_are_decomposed_anew(calibration, decomposed, tmp_path):
    model = Mixed()
    made = plan(model, factorization="tt", ranks=3, calibration=calibration)
    changed = copy.deepcopy(model)
    changed.head.weight.data.numpy()[0, 0] += 1e-6  # without a trace in its version
    for other in (changed, Mixed(seed=1), copy.deepcopy(model).double()):
        before, expected = len(decomposed), copy.deepcopy(other)
        apply_(other, made, calibration=calibration)
        assert len(decomposed) > before
        assert_same(other, apply_(expected, copy.copy(made), calibration=calibration))


def test_other_numbers_behind_the_inputs_are_measured_anew(measured):
    model = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 12)).eval()
    x = torch.randn(20, 12)
    made = plan(model, factorization="tt", ranks={"2": 3}, calibration=x)
    model[1].running_var.mul_(torch.linspace(0.1, 10, 12))
    apply_(model, made, calibration=x)
    assert len(measured) == 2


def test_what_is_kept_is_no_part_of_the_plan(tmp_path):
    model = Mixed()
    made = plan(model, factorization="tt", budget=0.6)
    bare = [loaded(made, tmp_path), copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    bare += [dataclasses.replace(made)]
    for other in bare:
        assert (other, repr(other), hash(other)) == (made, repr(made), hash(made))
        assert other.decompositions is None
        assert vars(other).keys() == {field.name for field in dataclasses.fields(Plan)}
    assert made.decompositions is not None
    assert (tmp_path / "plan.json").stat().st_size < 10_000


@CALIBRATION
def test_models_from_one_plan_are_independent(calibration):
    model = Mixed()
    made = plan(model, factorization="tt", ranks=3, calibration=calibration)
    first = apply_(copy.deepcopy(model), made, calibration=calibration)
    expected = copy.deepcopy(first.state_dict())
    with torch.no_grad():
        for tensor in first.state_dict().values():
            tensor.fill_(7)
    second = apply_(copy.deepcopy(model), made, calibration=calibration)
    assert all(value.equal(expected[name]) for name, value in second.state_dict().items())
    memory = [{tensor.data_ptr() for tensor in each.state_dict().values()} for each in (first, second)]
    assert not memory[0] & memory[1]


@pytest.mark.parametrize("training", [False, True])
def test_modes_and_frozen_weights_are_those_of_the_model_when_it_is_replaced(training):
    model = Mixed().train(not training)
    made = plan(model, factorization="tt", ranks=3)
    model.train(training)
    model.head.weight.requires_grad_(False)
    model.rnn.weight_hh_l0.requires_grad_(False)
    apply_(model, made)
    replaced = [module for module in model.modules() if isinstance(module, TensorizedLayer | TensorizedWeight)]
    assert [module.training for module in replaced] == 4 * [training]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.rpartition(".cores")[0] for name in frozen} == {
        "head.factorization",
        "rnn.parametrizations.weight_hh_l0.0.factorization",
    }
    assert model.embedding.factorization.cores[0].requires_grad


def test_no_dense_weight_is_cached():
    model = Mixed().eval()
    with torch.no_grad():
        made = plan(model, factorization="tt", ranks=3, calibration=TOKENS)
    weights = dict(made.decompositions._replacements)
    assert len(weights) == sum(layer.rank is not None for layer in made.layers)
    assert all(replacement._cached is None for replacement in weights.values())
