"""What calibration inputs tell is never left out in silence: compiled models, and layers that no input reaches."""

import copy

import pytest
import torch
from torch import nn

from tenzoo.compression import apply_, export, fold_, plan
from tests.compression.test_calibration import varied


def network():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(block, nn.Flatten(), nn.Linear(8 * 64, 6)).double().eval()


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def one_layer(model):
    model[2].compile(backend="eager")
    return model


def one_block(model):
    model[0] = torch.compile(model[0], backend="eager")
    return model


def one_wrapped_layer(model):
    model[2] = torch.compile(model[2], backend="eager")
    return model


COMPILED = [whole, in_place, one_layer, one_block]


@pytest.fixture(autouse=True)
def fresh():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_model_is_planned_as_it_is_without(compiled):
    images, model = varied(), compiled(network())
    with torch.no_grad():
        model(images)  # compiled from here on
    arguments = {"factorization": "tt", "budget": 0.4, "calibration": images, "example_input": images[:1]}
    made, expected = plan(model, **arguments), plan(network(), **arguments)
    assert made == expected
    blind = plan(network(), factorization="tt", budget=0.4)
    assert [layer.error for layer in made.layers] != [layer.error for layer in blind.layers]
    outputs = apply_(network(), expected, calibration=images)(images)
    with torch.no_grad():
        torch.testing.assert_close(apply_(model, made, calibration=images)(images), outputs)
        torch.testing.assert_close(fold_(model)(images), outputs)


def test_a_layer_that_is_wrapped_by_itself_stays_dense_and_says_why():
    made = plan(one_wrapped_layer(network()), factorization="tt", ranks=2, calibration=varied())
    assert {layer.name: layer.reason for layer in made.layers}["2"] == "is compiled by itself; compile it after"


def test_a_compiled_model_is_exported_as_it_is_without(tmp_path):
    images, model = varied(4).float(), whole(network().float())
    model(images)
    export(model, tmp_path / "model.pt2", images)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(images), model(images))


# --- layers that no input reaches ----------------------------------------------------------------------------------


class Auxiliary(nn.Module):
    """A head for training alone, one that is chosen by the input, and recurrent weights for long inputs alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.auxiliary, self.rare, self.recurrent = nn.Linear(8, 8), nn.Linear(8, 8), nn.GRU(8, 8, batch_first=True)

    def forward(self, x):
        y = self.body(x)
        if self.training:
            y = y + self.auxiliary(x)
        if x.shape[1] > 6:
            y = self.recurrent(y)[0]
        return self.rare(y) if x[0, 0, 0] > 100 else self.head(y)


X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["budget", "ranks"])
def test_layers_that_no_input_reaches_are_named(kind):
    amount = {"budget": 0.9} if kind == "budget" else {"ranks": 2}
    message = (
        r"inputs that reach every layer in `calibration`, got some that do not reach 'auxiliary', 'rare', "
        r"'recurrent\.weight_ih_l0' and 1 more; leave them out by `exclude`"
    )
    with pytest.raises(ValueError, match=message):
        plan(Auxiliary(), factorization="tt", calibration=X, **amount)
    reached = plan(
        model := Auxiliary(), factorization="tt", calibration=X, exclude=["auxiliary", "rare", "recurrent"], **amount
    )
    assert {layer.name for layer in reached.layers if layer.reason != "was excluded"} == {"body", "head"}
    apply_(model, reached, calibration=X)(X)
    plan(Auxiliary(), factorization="tt", calibration=X, ranks={"head": 2})  # the others stay dense


def test_a_layer_is_reached_if_any_batch_does():
    rare = X.clone()
    rare[0, 0, 0] = 200
    long = torch.randn(2, 7, 8)
    batches = [{"x": x} for x in (X, rare, long)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    made = plan(Auxiliary(), factorization="tt", calibration=loader, ranks=2, exclude=["auxiliary"])
    assert all(layer.rank for layer in made.layers if layer.name != "auxiliary")


def test_a_plan_that_replaces_what_these_inputs_do_not_reach_is_refused():
    model, other = Auxiliary(), X.clone()
    other[0, 0, 0] = 200
    made = plan(model, factorization="tt", calibration=other, ranks={"rare": 2})
    stored = copy.copy(made.__dict__) | {"calibration": None}  # from before the hash was kept
    with pytest.raises(ValueError, match="`calibration`, got some that do not reach 'rare'; leave them out"):
        apply_(model, type(made)(**stored), calibration=X)
    assert type(model.rare) is nn.Linear
