"""Weights that attention and recurrent layers read by name are made of cores where they are."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tenzoo import find_core_groups
from tenzoo.compression import apply_, export, fold_, plan, restore_
from tenzoo.layers import TensorizedWeight
from tests.factorizations.formats import NAMES

SEQUENCE = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Attention(nn.Module):
    """Queries of another width than keys and values, whose three weights are apart."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x[..., :6], x[..., :4])[0]


class Recurrent(nn.Module):
    def __init__(self, kind, **kwargs):
        super().__init__()
        self.recurrent = kind(8, 6, **kwargs)

    def forward(self, x):
        return self.recurrent(x)[0]


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(8, 6)

    def forward(self, x):
        return self.cell(x[:, 0])


MODELS = {
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2),
        ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"],
    ),
    "attention": (Attention, ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]),
    "lstm": (
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=3),
        [
            f"weight_{kind}_l{layer}{side}"
            for layer in (0, 1)
            for side in ("", "_reverse")
            for kind in ("ih", "hh", "hr")
        ],
    ),
    "gru": (lambda: Recurrent(nn.GRU), ["weight_ih_l0", "weight_hh_l0"]),
    "cell": (Cell, ["weight_ih", "weight_hh"]),
}


@pytest.fixture(params=MODELS)
def model_and_names(request):
    torch.manual_seed(0)
    make, names = MODELS[request.param]
    return make().double(), names


def exact(model, factorization):
    """A plan whose ranks are as large as they can be, whatever that costs."""
    made = plan(model, factorization=factorization, ranks=1)
    layers = [
        type(layer)(
            **{
                **layer.__dict__,
                "factorization": factorization,
                "rank": full,
                "parameters": number,
                "tensorization": whole(factorization, layer.shape),
                "reason": None,
            }
        )
        for layer in made.layers
        for full, number in [full_rank(factorization, layer.shape)]
    ]
    return type(made)(tuple(layers), made.other_parameters)


def full_rank(factorization, shape):
    tensorization = whole(factorization, shape)
    made = TensorizedWeight(shape, factorization=factorization, rank=1000, tensorization=tensorization)
    return made.factorization.rank, sum(core.numel() for core in made.factorization.cores)


def whole(factorization, shape):
    return None if factorization == "btt" else ((shape[0],), (shape[1],))


def test_all_of_them_are_found(model_and_names):
    model, names = model_and_names
    made = plan(model, factorization="tt", ranks=1)
    assert {layer.name.partition(".")[2].removeprefix("0.").removeprefix("1.") for layer in made.layers} >= set(names)
    assert all(layer.rank is not None for layer in made.layers)
    assert made.dense_parameters == sum(parameter.numel() for parameter in model.parameters())
    apply_(model, made)
    assert sum(parameter.numel() for parameter in model.parameters()) == made.parameters
    assert len(find_core_groups(model)) == len(made.layers)


@pytest.mark.parametrize("factorization", NAMES)
def test_full_rank_is_lossless_and_fold_gives_the_dense_model_back(model_and_names, factorization):
    model, _ = model_and_names
    small = apply_(copy.deepcopy(model), exact(model, factorization))
    assert any(parametrize.is_parametrized(module) for module in small.modules())
    for training in (True, False):
        torch.testing.assert_close(small.train(training)(SEQUENCE), model.train(training)(SEQUENCE))
        with torch.no_grad():
            torch.testing.assert_close(small(SEQUENCE), model(SEQUENCE))
            torch.testing.assert_close(copy.deepcopy(small)(SEQUENCE), model(SEQUENCE))
    folded = fold_(copy.deepcopy(small))
    torch.testing.assert_close(small(SEQUENCE), model(SEQUENCE))  # the copy's folding is its own
    assert [type(module) for module in folded.modules()] == [type(module) for module in model.modules()]
    assert [name for name, _ in folded.named_parameters()] == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(folded(SEQUENCE), model(SEQUENCE))


def test_all_cores_are_trained_and_what_is_frozen_stays_so(model_and_names):
    model, names = model_and_names
    for name, parameter in model.named_parameters():
        if name.endswith(names[0]):
            parameter.requires_grad_(False)
    small = apply_(model, plan(model, factorization="tt", ranks=2))
    before = small(SEQUENCE)
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], lr=0.1)
    before.square().sum().backward()
    for group in find_core_groups(small):
        frozen = f".{names[0].rpartition('.')[2]}." in group.name
        assert all((core.grad is None) == frozen for core in group.cores)
    optimizer.step()
    assert not torch.allclose(small(SEQUENCE), before)
    folded = fold_(small)
    for name, parameter in folded.named_parameters():
        assert parameter.requires_grad == (not name.endswith(names[0]))


def test_saved_weights_come_back_without_a_decomposition(model_and_names, monkeypatch):
    model, _ = model_and_names
    made = plan(model, factorization="tucker", ranks=2)
    small = apply_(copy.deepcopy(model), made)
    torch.save(small.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    monkeypatch.setattr("tenzoo.factorizations.Tucker.fit", None)
    again = restore_(copy.deepcopy(model), made, torch.load(buffer, weights_only=True))
    torch.testing.assert_close(again(SEQUENCE), small(SEQUENCE))
    assert all(parameter.requires_grad for parameter in again.parameters())
    with pytest.raises(ValueError, match=r"in `weights`, got '.*' of shape None where the plan has \("):
        restore_(copy.deepcopy(model), made, model.state_dict())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_copies_and_exports_after_a_forward_pass_with_gradients(tmp_path, kind):
    torch.manual_seed(0)
    model = Recurrent(kind, num_layers=2, batch_first=True).double()
    apply_(model, plan(model, factorization="tt", ranks=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(SEQUENCE).square().sum().backward()
    optimizer.step()  # the rebuilt weights of the last forward pass are of no use from here on
    copied = copy.deepcopy(model)
    expected = model(SEQUENCE)
    torch.testing.assert_close(copied(SEQUENCE), expected)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    copied(SEQUENCE).sum().backward()
    export(model, path := tmp_path / "model.pt2", SEQUENCE, factors=True)
    torch.testing.assert_close(torch.export.load(path).module()(SEQUENCE), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(SEQUENCE), expected)
    assert copied(SEQUENCE).abs().max() == 0


# --- the parametrization by itself ---------------------------------------------------------------------------------


def test_assigning_decomposes():
    torch.manual_seed(0)
    layer = nn.Linear(6, 8).double()
    cores = TensorizedWeight((8, 6), factorization="tr", rank=50, dtype=torch.float64)
    before = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", cores)
    torch.testing.assert_close(layer.weight, before)
    layer.weight = 2 * before
    torch.testing.assert_close(layer.weight, 2 * before)
    with pytest.raises(ValueError, match=r"expected a weight of shape \(8, 6\), got \(6, 8\)"):
        cores.right_inverse(before.t())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (8, 6, 1)}, r"two sizes in `shape`, got \(8, 6, 1\)"),
        ({"shape": (8, 0)}, "`in`, got 0"),
        ({"rank": 0}, "`rank`, got 0"),
        ({"factorization": "tensor"}, "`factorization`, got 'tensor'"),
        ({"tensorization": [[4], [6]]}, r"factors of out \(8\) and of in \(6\).* got \[\[4\], \[6\]\]"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TensorizedWeight(**{"shape": (8, 6), "factorization": "tt", "rank": 2, **arguments})
