"""Layers of cores whose weights other code reads, and models that do not run with them."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from tenzoo import find_core_groups
from tenzoo.compression import Plan, apply_, fold_, plan, restore_
from tenzoo.layers import TensorizedLayer, TensorizedLinear
from tests.factorizations.formats import NAMES

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
    """A function outside of the class reads the weight."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return product(self.second, self.first(x))


class HiddenConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return F.conv2d(self.first(x), getattr(self, "second").weight)  # noqa: B009


def state_of(model):
    """All that replacing a layer changes."""
    return [
        (module, type(module), list(module._modules.items()), list(module._parameters.items()), vars(module).keys())
        for module in model.modules()
    ]


def names_planned(made):
    return [layer.name for layer in made.layers if layer.rank]


MODELS = pytest.mark.parametrize(
    ("model", "inputs", "names"),
    [
        (Tied(), TOKENS, ["embedding", "hidden"]),
        (Casts(), X, ["first", "wo"]),
        (Through(), X, ["a", "b", "c", "more.0", "more.1", "never"]),
        (Hidden(), X, ["first", "second"]),
        (HiddenConvolution(), torch.randn(1, 4, 8, 8), ["first", "second"]),
    ],
    ids=["tied", "casts", "through", "hidden", "convolution"],
)


@MODELS
@pytest.mark.parametrize("argument", [None, "example_input", "calibration"])
def test_layers_whose_weights_are_read_become_layers(model, inputs, names, argument):
    given = {argument: inputs} if argument else {}
    made = plan(model, factorization="tt", ranks=1, **given)
    assert names_planned(made) == names
    small = apply_(copy.deepcopy(model), made, **given)
    assert all(isinstance(small.get_submodule(name), TensorizedLayer) for name in names)
    torch.testing.assert_close(small(inputs), fold_(copy.deepcopy(small))(inputs))
    again = restore_(copy.deepcopy(model), made, small.state_dict())
    torch.testing.assert_close(again(inputs), small(inputs))
    small(inputs).sum().backward()
    assert all(core.grad is not None for group in find_core_groups(small) for core in group.cores)


def test_a_swin_transformer_runs():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": [4, 4]}
    model, images = torchvision.models.SwinTransformer(**sizes, num_classes=10).eval(), torch.randn(2, 3, 32, 32)
    made = plan(model, factorization="tt", budget=0.4, calibration=images)
    small = apply_(copy.deepcopy(model), made, calibration=images)
    assert sum(parameter.numel() for parameter in small.parameters()) == made.parameters
    assert "features.1.0.attn.qkv" in names_planned(made)
    torch.testing.assert_close(small(images), fold_(copy.deepcopy(small))(images), atol=1e-5, rtol=1e-4)


def test_a_layer_that_is_read_saves_no_multiplications():
    torch.manual_seed(0)
    model, given = Hidden(256), {"factorization": "tt", "example_input": torch.randn(3, 256)}
    first, second = plan(model, ranks=1, **given).layers
    assert (first.dense_multiplications, second.dense_multiplications) == (256**2, 256**2)
    assert (first.multiplications, second.multiplications) == (2 * 256, 256**2)
    message = "65,536 in 'second', which is reconstructed where a module reads it, which saves none"
    with pytest.raises(ValueError, match=message):
        plan(model, budget=0.5, count="multiplications", **given)
    small = apply_(model, plan(model, budget=0.9, count="multiplications", **given))
    assert (small.first.implementation, type(small.second)) == ("contract", nn.Linear)


@pytest.mark.parametrize("kept", ["second", "first"])
def test_a_plan_of_an_earlier_version_is_refused(kept, tmp_path):
    """Then the weight of a layer that other code reads stayed a parameter with cores."""
    plan(model := Hidden(), factorization="tt", ranks=2).save(path := tmp_path / "plan.json")
    path.write_text(path.read_text().replace(f'"{kept}"', f'"{kept}.weight"'))
    made, before = Plan.load(path), state_of(model)
    message = (
        rf"replaces the layer '{kept}', got one of an earlier version that keeps its weight as the parameter "
        rf"'{kept}\.weight'; plan the model again"
    )
    for use in (lambda: apply_(model, made), lambda: restore_(model, made, {})):
        with pytest.raises(ValueError, match=message):
            use()
    assert state_of(model) == before


@pytest.mark.parametrize("layers", [(0, 1), (0,), (1,)])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_an_encoder_stays_on_its_fast_path(layers):
    """Torch makes nested tensors of padded sequences there, and sets the padding of its outputs to 0."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, dropout=0.0), 2).eval()
    mask = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]] * 3).bool()
    given = {"src": torch.randn(6, 5, 16), "src_key_padding_mask": mask}
    ranks = {f"layers.{k}.linear{n}.weight": 2 for k in layers for n in (1, 2)}
    made = plan(model, factorization="tt", ranks=ranks, calibration=given, example_input=given)
    assert names_planned(made) == list(ranks)
    small = apply_(copy.deepcopy(model), made, calibration=given)
    folded = fold_(copy.deepcopy(small))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = small(**given)
            torch.testing.assert_close(found, folded(**given))
            assert not found[mask].any()
    torch.testing.assert_close(small(**given), folded(**given))


@pytest.mark.parametrize("factorization", [*NAMES, "ar,br->ab"])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_a_linear_layer_takes_nested_tensors(factorization):
    layer = TensorizedLinear(6, 8, factorization=factorization, rank=2, implementation="contract")
    rows = [torch.randn(2, 6), torch.randn(3, 6)]
    with torch.no_grad():
        for found, x in zip(layer(torch.nested.nested_tensor(rows)).unbind(), rows, strict=True):
            torch.testing.assert_close(found, layer(x))


# --- a trial run ---------------------------------------------------------------------------------------------------


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
        r"\(.*test_read_weights\.py:\d+\), which has the layers "
        r"\['0\.layer'\] of cores; exclude them from plan"
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
