"""Weights come back into models that have no memory yet, that are compiled, or that were parametrized otherwise."""

import copy

import pytest
import torch
from torch import nn

from tenzoo.compression import apply_, fold_, plan, restore_

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Layers, parametrized weights, buffers, and a parameter that two modules share."""

    def __init__(self, persistent=True):
        super().__init__()
        self.first, self.recurrent = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.BatchNorm1d(8)
        self.left, self.right = nn.LayerNorm(8), nn.LayerNorm(8)
        self.right.weight = self.left.weight
        self.last = nn.Linear(8, 3)
        self.last.weight.requires_grad_(False)
        self.register_buffer("scale", torch.full((), 2.0), persistent=persistent)

    def forward(self, x):
        y = self.recurrent(self.first(x))[0]
        y = self.attention(y, y, y)[0]
        y = self.norm(y.flatten(0, 1)).reshape(y.shape)
        return self.last(self.left(y) + self.right(y)) * self.scale


def made():
    """A compressed model that was trained a little, and its plan."""
    torch.manual_seed(0)
    model = Mixed()
    found = plan(model, factorization="tt", ranks=2)
    apply_(model, found)
    for _ in range(2):
        model(X)
    return model.eval(), found


def on_meta(**kwargs):
    with torch.device("meta"):
        return Mixed(**kwargs).eval()


def in_part():
    model = Mixed().eval()
    model.first.to("meta")
    model.norm.to("meta")
    return model


@pytest.mark.parametrize("make", [on_meta, in_part])
def test_a_model_on_the_meta_device_gets_memory(make):
    small, found = made()
    restored = restore_(make(), found, small.state_dict())
    assert not any(x.is_meta for x in (*restored.parameters(), *restored.buffers()))
    assert restored.left.weight is restored.right.weight
    trained = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in restored.named_parameters()} == trained
    torch.testing.assert_close(restored(X), small(X))
    torch.testing.assert_close(fold_(restored)(X), small(X))


def test_a_buffer_that_the_weights_leave_out_cannot_come_from_them():
    small, found = made()
    weights = {name: value for name, value in small.state_dict().items() if name != "scale"}
    model = on_meta(persistent=False)
    with pytest.raises(ValueError, match="state dict leaves out, got 'scale' on the meta device in `model`"):
        restore_(model, found, weights)
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))
    assert type(model.first) is nn.Linear
    torch.testing.assert_close(restore_(Mixed(persistent=False).eval(), found, weights)(X), small(X))


def test_weights_without_numbers_are_refused():
    small, found = made()
    weights = {name: value.to("meta") for name, value in small.state_dict().items()}
    with pytest.raises(ValueError, match=r"in `weights`, got 'scale' on the meta device, without numbers"):
        restore_(Mixed(), found, weights)


def test_a_plan_cannot_be_carried_out_on_the_meta_device():
    _, found = made()
    with pytest.raises(ValueError, match="on the meta device"):
        apply_(model := on_meta(), found)
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize("saved", ["", "_orig_mod."])
def test_a_compiled_model_takes_the_weights_of_one_that_is_not(saved):
    small, found = made()
    model = torch.compile(Mixed().eval(), backend="eager")
    weights = {f"{saved}{name}": value for name, value in small.state_dict().items()}
    with torch.no_grad():
        model(X)
        assert restore_(model, found, weights) is model
        torch.testing.assert_close(model(X), small(X))
    torch.compiler.reset()


def test_another_parametrization_on_top_of_cores_is_not_dropped():
    model = nn.Sequential(nn.GRU(8, 8))
    apply_(model, plan(model, factorization="tt", ranks=2))
    nn.utils.parametrizations.spectral_norm(model[0], "weight_ih_l0")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"cores alone in `model`, got '0\.weight_ih_l0' with 1 more parametrizations"):
        fold_(model)
    assert model.state_dict().keys() == before.keys()
