"""Weights that another module reads stay where it finds them, and a model that does not run is not handed out."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from tenzoo.compression import apply_, fold_, plan, restore_
from tenzoo.compression.readers import readers_in_code

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(12).reshape(2, 6)


class Tied(nn.Module):
    """The head is the embedding, read as a tensor."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(30, 8), nn.Linear(8, 8)

    def forward(self, tokens):
        return F.linear(self.hidden(self.embedding(tokens)), self.embedding.weight)


class Casts(nn.Module):
    """Asks for the weight's type before it calls the layer, as T5 does."""

    def __init__(self):
        super().__init__()
        self.first, self.wo = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.wo(self.first(x).relu().to(self.wo.weight.dtype))


class Through(nn.Module):
    """By way of a method, a property, a local name and a loop."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.more = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.never = nn.Linear(8, 8)

    def init_weights(self):
        nn.init.zeros_(self.never.weight)

    @property
    def last(self):
        return self.c.weight

    def penalty(self):
        layer = self.b
        return layer.weight.norm()

    def forward(self, x):
        x = F.linear(x, self.a.weight) * self.penalty()
        for k, layer in enumerate(self.more):
            x = x @ layer.weight.t() + k
        return self.never(F.linear(x, self.last))


def product(layer, x):
    return F.linear(x, layer.weight, layer.bias)


class Hidden(nn.Module):
    """A function outside of the class reads the weight: its code does not tell."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return product(self.second, self.first(x))


class HiddenConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return F.conv2d(self.first(x), getattr(self, "second").weight)  # noqa: B009


def names_read(model):
    found = readers_in_code(model)
    return {name: found[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in found}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Tied(), {"embedding.weight": "Tied"}),
        (nn.Sequential(Casts()), {"0.wo.weight": "Casts '0'"}),
        (Through(), dict.fromkeys([f"{n}.weight" for n in ("a", "b", "c", "more.0", "more.1")], "Through")),
        (Hidden(), {}),
        (nn.Sequential(nn.Linear(8, 8)), {}),
    ],
    ids=["tied", "casts", "through", "hidden", "plain"],
)
def test_what_the_code_reads(model, expected):
    assert names_read(model) == expected


@pytest.mark.parametrize(
    ("model", "inputs", "kept"),
    [
        (Tied(), TOKENS, {"embedding.weight", "hidden"}),
        (Casts(), X, {"first", "wo.weight"}),
        (Through(), X, {"a.weight", "b.weight", "c.weight", "more.0.weight", "more.1.weight", "never"}),
    ],
    ids=["tied", "casts", "through"],
)
def test_weights_that_are_read_become_cores_where_they_are(model, inputs, kept):
    made = plan(model, factorization="tt", ranks=2)  # no input tells
    assert {layer.name for layer in made.layers if layer.rank} == kept
    small = apply_(copy.deepcopy(model), made)
    torch.testing.assert_close(small(inputs), fold_(copy.deepcopy(small))(inputs))
    again = restore_(copy.deepcopy(model), made, small.state_dict())
    torch.testing.assert_close(again(inputs), small(inputs))
    small(inputs).sum().backward()
    assert all(parameter.grad is not None for name, parameter in small.named_parameters() if "bias" not in name)


def test_a_swin_transformer_runs():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": [4, 4]}
    model, images = torchvision.models.SwinTransformer(**sizes, num_classes=10).eval(), torch.randn(2, 3, 32, 32)
    made = plan(model, factorization="tt", budget=0.4, calibration=images)
    small = apply_(copy.deepcopy(model), made, calibration=images)
    assert sum(parameter.numel() for parameter in small.parameters()) == made.parameters
    ranks = {layer.name: layer.rank for layer in made.layers}
    assert ranks["features.1.0.attn.qkv.weight"] is not None
    torch.testing.assert_close(small(images), fold_(copy.deepcopy(small))(images), atol=1e-5, rtol=1e-4)


# --- what the code does not tell -----------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["example_input", "calibration"])
def test_an_input_tells_a_plan_what_the_code_does_not(argument):
    model = Hidden()
    made = plan(model, factorization="tt", ranks=2, **{argument: X})
    assert [layer.name for layer in made.layers] == ["first", "second.weight"]
    small = apply_(copy.deepcopy(model), made, **{argument: X})
    torch.testing.assert_close(small(X), fold_(copy.deepcopy(small))(X))
    torch.testing.assert_close(restore_(model, made, small.state_dict())(X), small(X))


def test_a_convolution_that_is_read_stays_dense():
    model = HiddenConvolution()
    images = torch.randn(1, 4, 8, 8)
    made = plan(model, factorization="tt", ranks=1, example_input=images)
    assert [layer.reason for layer in made.layers] == [None, "has a weight that HiddenConvolution reads"]
    apply_(model, made, example_input=images)(images)


class First(nn.Module):
    """Asks any parameter for its device, which cores have too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 8, 3)

    def forward(self, x):
        first = next(self.parameters())
        return self.layer(x.to(first.device, first.dtype)) + 0 * first.ndim


def test_who_asks_for_a_device_reads_no_weight():
    images = torch.randn(1, 4, 8, 8)
    made = plan(model := First(), factorization="tt", ranks=1, example_input=images)
    assert made.layers[0].rank
    apply_(model, made, example_input=images)


def state_of(model):
    """All that replacing a layer changes."""
    return [
        (module, type(module), list(module._modules.items()), list(module._parameters.items()), vars(module).keys())
        for module in model.modules()
    ]


class Mixed(nn.Module):
    """Recurrent weights, that are parametrized, beside a layer that something hidden reads."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.attention = nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = Hidden()

    def forward(self, x):
        y = self.recurrent(x)[0]
        return self.hidden(self.attention(y, y, y)[0])


@pytest.mark.parametrize("trained", [False, True])
def test_a_layer_that_is_read_is_named_with_its_reader_and_nothing_changes(trained):
    model = Mixed()
    if trained:
        model(X).sum().backward()
    made = plan(model, factorization="tt", ranks=2)
    before, expected = state_of(model), model(X)
    message = (
        r"keeps the weight of 'hidden\.second' where Hidden 'hidden' reads it, got one that replaces the layer; plan "
        "the model with this input as `example_input`, or exclude the layer"
    )
    with pytest.raises(ValueError, match=message):
        apply_(model, made, example_input=X)
    assert state_of(model) == before
    torch.testing.assert_close(model(X), expected)


class Types(nn.Module):
    """Takes one class of layers alone."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.layer = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        if type(self.layer) is not nn.Linear:
            raise RuntimeError("a Linear\nis wanted")
        return self.layer(self.recurrent(x)[0])


def test_a_model_that_does_not_run_is_as_it_was_and_its_module_is_named():
    model = nn.Sequential(Types())
    made, expected = plan(model, factorization="tt", ranks=2), model(X)
    before = state_of(model)
    message = (
        r"runs on `example_input` with its layers made of cores, got RuntimeError: a Linear in Types '0' "
        r"\(.*test_readers\.py:\d+\), which has the layers "
        r"\['0\.layer'\] of cores; exclude those it reads"
    )
    with pytest.raises(ValueError, match=message):
        apply_(model, made, example_input=X)
    assert state_of(model) == before
    torch.testing.assert_close(model(X), expected)
    assert all(x is y for x, y in zip(model[0].recurrent._flat_weights, model[0].recurrent.parameters(), strict=True))


def test_an_owner_that_was_parametrized_before_is_as_it_was():
    model = nn.Sequential(Types())
    nn.utils.parametrizations.weight_norm(model[0].recurrent, "bias_ih_l0", dim=None)
    made, before = plan(model, factorization="tt", ranks=2), state_of(model)
    properties = set(vars(type(model[0].recurrent)))
    with pytest.raises(ValueError, match="a Linear in Types '0'"):
        apply_(model, made, example_input=X)
    assert state_of(model) == before
    assert set(vars(type(model[0].recurrent))) == properties
    model(X)


class Keeper:
    """A class keeps the layer, and nobody looks into those."""


class Listed(nn.Module):
    """Calls its layers from a list that is no ModuleList."""

    def __init__(self, hide):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers, self.hide = Keeper() if hide else {"layers": [self.b]}, hide
        Keeper.layer = self.b

    def forward(self, x):
        layer = self.layers.layer if self.hide else self.layers["layers"][0]
        return layer(self.a(x))


def test_a_layer_in_a_plain_list_would_go_on_being_called():
    made = plan(Listed(hide=False), factorization="tt", ranks=2)
    assert [layer.reason for layer in made.layers] == [None, "is also held by the plain attribute 'layers'"]
    model = Listed(hide=True)
    made, before = plan(model, factorization="tt", ranks=2), state_of(model)
    with pytest.raises(ValueError, match="a call of the dense 'b', which is held outside of the model's modules"):
        apply_(model, made, example_input=X)
    assert state_of(model) == before


def test_the_model_is_run_in_evaluation_mode_and_keeps_its_buffers():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(6))
    apply_(model, plan(model, factorization="tt", ranks=2), example_input=X)
    assert model.training
    assert model[1].num_batches_tracked == 0
    assert model[1].running_mean.eq(0).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_models_without_layers_or_shapes_are_refused():
    scripted = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 8))
    for model, message in (
        (scripted, "not scripted in `model`, got '0', which is; script it after"),
        (nn.Sequential(nn.LazyLinear(8)), "shapes in `model`, got '0', which has none yet; run the model once"),
    ):
        for inputs in ({}, {"calibration": X}):
            with pytest.raises(ValueError, match=message):
                plan(model, factorization="tt", ranks=2, **inputs)
