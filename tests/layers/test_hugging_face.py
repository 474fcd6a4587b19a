"""The linear layer of GPT-2 in Hugging Face's layout, dense and with cores."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from tenzoo.compression import apply_, fold_, plan, restore_
from tests.factorizations.formats import NAMES
from tests.hugging_face import Conv1D
from tests.layers.makers import TensorizedTransposedLinear

X = torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(0))


def dense():
    torch.manual_seed(0)
    layer = Conv1D(8, 12)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("name", NAMES)
def test_a_full_rank_is_an_exact_round_trip(name):
    layer = TensorizedTransposedLinear.from_dense(dense(), factorization=name, rank=200)
    again = layer.to_dense()
    assert type(again) is Conv1D
    assert isinstance(layer, Conv1D)
    torch.testing.assert_close(again.weight, dense().weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.weight, again.weight.detach())
    for layer.implementation in ("reconstruct", "contract"):
        torch.testing.assert_close(layer(X), dense()(X), atol=1e-5, rtol=1e-4)


def test_a_new_layer_has_the_variance_of_he_and_no_bias():
    torch.manual_seed(0)
    layer = TensorizedTransposedLinear(200, 300, factorization="tt", rank=40)
    assert layer.weight.var().item() == pytest.approx(2 / 300, rel=0.15)
    assert not layer.bias.any()
    assert repr(layer).startswith("TensorizedTransposedLinear(")
    assert "nf=200, nx=300, implementation=auto" in repr(layer)
    assert pickle.loads(pickle.dumps(layer)).weight.equal(layer.weight)


def test_mistakes_are_named():
    for sizes, message in (((0, 3), "`nf`, got 0"), ((3, 0), "`nx`, got 0")):
        with pytest.raises(ValueError, match=message):
            TensorizedTransposedLinear(*sizes, factorization="tt", rank=2)
    with pytest.raises(TypeError, match=r"a \S+\.Conv1D in `layer`, got a Linear"):
        TensorizedTransposedLinear.from_dense(nn.Linear(3, 3), factorization="tt", rank=2)
    with pytest.raises(ValueError, match=r"factors of nf \(8\) and of nx \(12\)"):
        TensorizedTransposedLinear(8, 12, factorization="tt", rank=2, tensorization=[[3], [12]])


@pytest.mark.parametrize("argument", [None, "example_input", "calibration"])
def test_a_model_is_planned_compressed_restored_and_folded(argument):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(32, 12), nn.GELU(), Conv1D(12, 32))
    given = {argument: X} if argument else {}
    made = plan(model, factorization="tt", budget=0.6, **given)
    assert [(layer.kind, layer.shape) for layer in made.layers] == [("Conv1D", (12, 32)), ("Conv1D", (32, 12))]
    assert all(layer.rank for layer in made.layers)
    if argument == "example_input":
        assert [layer.dense_multiplications for layer in made.layers] == [3 * 12 * 32] * 2
    small = apply_(copy.deepcopy(model), made, **given)
    assert sum(parameter.numel() for parameter in small.parameters()) == made.parameters
    torch.testing.assert_close(restore_(copy.deepcopy(model), made, small.state_dict())(X), small(X))
    folded = fold_(copy.deepcopy(small))
    assert [type(layer) for layer in folded] == [Conv1D, nn.GELU, Conv1D]
    torch.testing.assert_close(folded(X), small(X))


def test_without_transformers_nothing_of_it_is_imported():
    code = (
        "import sys; from torch import nn; from tenzoo.compression import plan; "
        "plan(nn.Sequential(nn.Linear(8, 8)), factorization='tt', ranks=1); "
        "assert not [name for name in sys.modules if name.startswith('transformers')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
