"""What a plan promises is what the compressed model does, whatever else the model does in a forward pass."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from tenzoo.compression import apply_, fold_, plan, restore_
from tenzoo.layers import TensorizedLinear
from tests.factorizations.formats import NAMES


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 32, generator=generator) * torch.linspace(0.05, 3, 32)


def off(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def held_back(model, made, x):
    """Error of the outputs on the last quarter of the inputs, in evaluation mode, each run from the same state."""
    small = apply_(copy.deepcopy(model), made, calibration=x)
    with torch.no_grad():
        return off(small.eval()(x[48:].clone()), copy.deepcopy(model).eval()(x[48:].clone()))


class Asks(nn.Module):
    """Treats layers by their class."""

    def __init__(self, otherwise):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10)])
        self.otherwise = otherwise

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = torch.relu(x) if type(layer) is nn.Linear else self.otherwise * x
        return x


@pytest.mark.parametrize("otherwise", [1.0, torch.nan])
@pytest.mark.parametrize("argument", ["calibration", "example_input"])
def test_a_model_that_asks_for_the_class_of_a_layer_is_refused(argument, otherwise):
    torch.manual_seed(0)
    model, given = Asks(otherwise), {argument: inputs()}
    made = plan(model, factorization="tt", ranks=8, **given)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=rf"outputs on `{argument}` that are .* of their size apart; .*type\(layer\) is nn"
    ):
        apply_(model, made, **given)
    assert all(type(layer) is nn.Linear for layer in model.layers)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


class Own(nn.Module):
    """A network that keeps something in attributes, or draws random numbers of its own."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 10)
        self.kind, self.state, self.calls = kind, 0.0, 0

    def forward(self, x):
        self.calls += 1
        y = self.first(x)
        if self.kind == "state":
            y = y + self.state
            self.state = y.mean(0).detach()
        if self.kind == "numpy":
            y = y * np.random.uniform(0.5, 2)  # noqa: NPY002
        if self.kind == "python":
            y = y * random.uniform(0.5, 2)
        return self.last(torch.relu(y))


@pytest.mark.parametrize("kind", ["nothing", "state", "numpy", "python"])
def test_what_a_forward_pass_leaves_behind_does_not_count(kind):
    torch.manual_seed(0)
    model, x = Own(kind), inputs()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    drawn = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    made = plan(model, factorization="tt", ranks={"first": 8}, calibration=x)
    assert (model.state, model.calls) == (0.0, 0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == drawn  # noqa: NPY002
    errors = []
    small = apply_(copy.deepcopy(model), made, calibration=x)
    for network in (small, model):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        with torch.no_grad():
            errors.append(network(x[48:]))
    assert made.output_error == pytest.approx(off(*errors), rel=1e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("factorization", NAMES)
def test_an_autocast_around_a_plan_changes_nothing(factorization):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)), inputs()
    plans, small = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            plans.append(plan(model, factorization=factorization, budget=0.6, calibration=x))
            small.append(apply_(copy.deepcopy(model), plans[-1], calibration=x))
    assert plans[0] == plans[1]
    assert 0 < plans[0].output_error < 1
    assert held_back(model, plans[0], x) == pytest.approx(plans[0].output_error, rel=1e-4)
    for one, other in zip(small[0].parameters(), small[1].parameters(), strict=True):
        assert one.equal(other)


def test_weights_that_overlap_in_memory_stay_as_they_are():
    torch.manual_seed(0)
    base = torch.randn(96, 32)
    before = base.clone()
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 64))
    model[0].weight, model[2].weight = nn.Parameter(base[:64]), nn.Parameter(base[32:])
    for arguments in ({"ranks": 8}, {"budget": 0.9}):
        made = plan(model, factorization="tt", calibration=inputs(), **arguments)
        reasons = ["shares its weight with 2.weight", None, "shares its weight with 0.weight"]
        assert [layer.reason for layer in made.layers] == reasons
        assert base.equal(before)


class Scaled(TensorizedLinear):
    def forward(self, x):
        return 3 * super().forward(x)


def layer(kind=TensorizedLinear):
    return kind(8, 8, factorization="tt", rank=2)


def hooked():
    (made := layer()).register_forward_hook(lambda _, inputs, output: 3 * output)
    return made


def adapted():
    (made := layer()).adapter = nn.Linear(8, 1)
    return made


def replaced():
    (made := layer()).forward = lambda x: x
    return made


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hooked, "has hooks"),
        (lambda: layer(Scaled), f"is a {__name__}.Scaled, a class of its own"),
        (adapted, "has more than a weight and a bias"),
        (replaced, "has a forward pass of its own"),
    ],
)
def test_a_layer_that_does_more_than_its_dense_one_is_not_folded(make, reason):
    model = nn.Sequential(layer(), make())
    with pytest.raises(ValueError, match=rf"a Linear can replace in `model`, got '1', which {reason}"):
        fold_(model)
    assert isinstance(model[0], TensorizedLinear)


def test_a_layer_in_a_plain_list_is_not_folded():
    model = nn.Sequential(layer(), nn.ReLU())
    model.todo = [model[0]]
    with pytest.raises(ValueError, match="got '0', which is also held by the plain attribute 'todo'"):
        fold_(model)


# --- what layers share -----------------------------------------------------------------------------------------------


class SharedBiases(nn.Module):
    """One bias of two layers, and one that the model itself has beside its head, as BERT's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 24)
        self.second.bias = self.first.bias
        self.bias = nn.Parameter(torch.randn(24))
        self.head.bias = self.bias

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def check_shared(model):
    assert model.first.bias is model.second.bias
    assert model.head.bias is model.bias
    names = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert names == ["bias", "first.bias"]


def test_a_bias_that_layers_share_is_shared_afterwards():
    model = SharedBiases()
    model.first.bias.register_hook(torch.zeros_like)
    whole = sum(p.numel() for p in model.parameters())
    made = plan(model, factorization="tt", budget=0.5)
    apply_(model, made)
    assert made.parameters == sum(p.numel() for p in model.parameters()) <= 0.5 * whole
    check_shared(model)
    model(inputs()).square().mean().backward()
    assert model.first.bias.grad.eq(0).all()  # by its hook
    assert model.bias.grad.ne(0).any()
    with torch.device("meta"):
        bare = SharedBiases()
    for other in (SharedBiases(), bare):
        restored = restore_(other, made, model.state_dict())
        check_shared(restored)
        torch.testing.assert_close(restored(inputs()), model(inputs()))
    expected = model(inputs())
    check_shared(fold_(model))
    torch.testing.assert_close(model(inputs()), expected)


def test_cores_that_layers_share_become_one_weight():
    model = nn.Sequential(layer(), nn.ReLU(), layer())
    model[2].factorization = model[0].factorization
    expected = model(torch.ones(2, 8))
    fold_(model)
    assert model[0].weight is model[2].weight
    assert model[0].bias is not model[2].bias
    torch.testing.assert_close(model(torch.ones(2, 8)), expected)
