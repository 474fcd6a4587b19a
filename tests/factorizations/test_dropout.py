"""Tensor dropout: the expectation is the tensor, and all computations see the masks."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from tenzoo import find_core_groups
from tenzoo.compression import fold_
from tenzoo.factorizations import Factorization, factorization_class, masks, tensor_dropout_
from tenzoo.factorizations.network import Network
from tenzoo.layers import (
    TensorContraction,
    TensorizedConv2d,
    TensorizedConvTranspose1d,
    TensorizedEmbedding,
    TensorizedEmbeddingBag,
    TensorizedLinear,
    TensorizedWeight,
    TensorRegression,
)
from tenzoo.tasks import SAM
from tests.factorizations.formats import NAMES, dense_oracle, full_index
from tests.factorizations.test_networks import equations, weight_of
from tests.tasks.toy import Batches, Regression, assert_same_weights, sgd, trainer

P = 0.3
SHAPES = {"btt": (2, 3, 2, 2)}


def of_format(name: str, rank: int = 2) -> Factorization:
    torch.manual_seed(0)
    return factorization_class(name)(SHAPES.get(name, (3, 2, 3)), rank, dtype=torch.float64)


def bonds_of(weight: Factorization) -> list[int]:
    """Sizes of the bonds that can lose an index, counted from the cores."""
    network: Network = weight.network(len(weight.shape))
    sizes = network.sizes(weight.shape, weight.rank)
    return [sizes[bond] for bond in network.bonds if sizes[bond] > 1]


def assert_expectation(weight: Factorization) -> None:
    """The mean over all masks, each with its probability."""
    expected, bonds = weight.reconstruct().detach(), bonds_of(weight)
    tensor_dropout_(weight, P)
    mean, total = torch.zeros_like(expected), 0.0
    given_masks: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(masks, "draw_mask", lambda shape, core, p: given_masks.pop(0).reshape(shape))
        for kept in itertools.product([0, 1], repeat=sum(bonds)):
            given_masks += (torch.tensor(kept).double() / (1 - P)).split(bonds)
            probability = math.prod(1 - P if each else P for each in kept)
            mean += probability * weight.reconstruct()
            total += probability
            assert given_masks == []  # one mask for each bond, also where it has three cores or more
    assert total == pytest.approx(1)
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_expectation_is_the_tensor(name):
    assert_expectation(of_format(name))


@settings(deadline=None, max_examples=25)
@given(equations())
def test_the_expectation_of_any_network_is_the_tensor(equation):
    assert_expectation(weight_of(equation))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_expectation(name):
    weight = of_format(name, 3)
    expected = weight.reconstruct().detach()
    tensor_dropout_(weight, P)
    with torch.no_grad():
        samples = torch.stack([weight.reconstruct() for _ in range(6000)])
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() < 5 * error + 1e-9).all()
    assert (error > 0).any()


def test_an_index_of_cps_rank_is_one_term():
    weight = tensor_dropout_(of_format("cp", 5), 0.5)
    terms = torch.einsum("ar,br,cr->rabc", *weight.cores)
    for _ in range(20):
        random = torch.get_rng_state()
        kept = nn.functional.dropout(torch.ones(5).double(), 0.5)
        torch.set_rng_state(random)
        torch.testing.assert_close(weight.reconstruct(), torch.einsum("r,rabc->abc", kept, terms))


@pytest.mark.parametrize("name", NAMES)
def test_entries_see_the_masks_and_so_do_gradients(name):
    weight = tensor_dropout_(of_format(name, 3), P)
    index = full_index(weight.shape)
    torch.manual_seed(5)
    cores = weight.operands
    assert any(core is not parameter for core, parameter in zip(cores, weight.cores, strict=True))
    expected = dense_oracle(name, cores)
    wanted = torch.autograd.grad(expected.square().sum(), list(weight.cores))
    for computed in (lambda: weight.reconstruct().flatten(), lambda: weight.entries(index)):
        torch.manual_seed(5)
        values = computed()
        torch.testing.assert_close(values, expected.flatten())
        torch.testing.assert_close(torch.autograd.grad(values.square().sum(), list(weight.cores)), wanted)
    torch.manual_seed(5)
    weight.entries(index, sparse_grad=True).square().sum().backward()
    torch.testing.assert_close([core.grad.to_dense() for core in weight.cores], list(wanted))


IMAGE = {"kernel_size": 3, "padding": 1}
LAYERS = {
    "linear": (lambda **kwargs: TensorizedLinear(8, 12, **kwargs), (3, 8)),
    "conv": (lambda **kwargs: TensorizedConv2d(8, 4, **IMAGE, **kwargs), (2, 8, 5, 4)),
    "pixel": (lambda **kwargs: TensorizedConv2d(8, 4, 1, **kwargs), (2, 8, 5, 4)),
    "transposed": (lambda **kwargs: TensorizedConvTranspose1d(8, 4, **IMAGE, groups=2, **kwargs), (2, 8, 5)),
    "embedding": (lambda **kwargs: TensorizedEmbedding(12, 8, **kwargs), None),
    "bag": (lambda **kwargs: TensorizedEmbeddingBag(12, 8, **kwargs), None),
    "regression": (lambda **kwargs: TensorRegression((3, 4), (2, 5), **kwargs), (3, 3, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", [*NAMES, "loop"])
def test_each_layer_sees_the_masks_in_both_ways(name, kind):
    make, shape = LAYERS[kind]
    if name == "loop":
        name = {"conv": "axy,byz,czx->abc", "regression": "axy,bxv,cyz,dzv->abcd"}.get(kind, "axy,bxz,yz->ab")
        name = "axy,byz,czx->abc" if kind == "transposed" else name
    torch.manual_seed(0)
    layer = make(factorization=name, rank=3, dtype=torch.float64)
    x = torch.randint(0, 12, (3, 2)) if shape is None else torch.randn(shape, dtype=torch.float64)
    dense = layer(x)
    tensor_dropout_(layer, P)
    found: dict[str, list[torch.Tensor]] = {}
    for layer.implementation in ("reconstruct", "contract"):
        outputs = found[layer.implementation] = []
        for seed in range(5):
            torch.manual_seed(seed)
            outputs.append(layer(x))
        assert len({str(output) for output in outputs}) > 2
        torch.testing.assert_close(layer.eval()(x), dense)
        layer.train()
    torch.testing.assert_close(found["contract"], found["reconstruct"])


def test_evaluation_and_no_dropout_cost_nothing():
    weight = of_format("tt", 3)
    before = torch.get_rng_state()
    for module in (weight, tensor_dropout_(weight, 0.0), tensor_dropout_(weight, 0.4).eval()):
        assert all(core is own for core, own in zip(module.operands, module.cores, strict=True))
        module.reconstruct()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_a_bond_of_size_one_is_kept(name):
    weight = of_format(name, 1)
    expected = weight.reconstruct()
    tensor_dropout_(weight, 0.9)
    assert torch.equal(weight.reconstruct(), expected)
    layer = TensorContraction((3, 4), 2)  # without bonds
    x = torch.randn(3, 3, 4)
    assert torch.equal(tensor_dropout_(layer, 0.9)(x), layer.eval()(x))


def test_it_stays_with_the_module():
    model = nn.Sequential(TensorizedLinear(8, 8, factorization="tt", rank=2), nn.Linear(8, 8))
    assert tensor_dropout_(model, 0.25) is model
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].factorization.dropout == 0.25
    assert set(model.state_dict()) == {
        *(f"0.factorization.cores.{k}" for k in range(6)),
        "0.bias",
        "1.weight",
        "1.bias",
    }


@pytest.mark.parametrize(
    ("make", "p", "error", "message"),
    [
        (lambda: of_format("cp"), 1.0, ValueError, "`p`, got 1.0"),
        (lambda: of_format("cp"), -0.1, ValueError, "`p`, got -0.1"),
        (lambda: of_format("cp"), math.nan, ValueError, "`p`, got nan"),
        (lambda: of_format("cp"), "0.1", TypeError, "`p`, got '0.1'"),
        (lambda: nn.Linear(3, 3), 0.1, ValueError, "factorizations in `module`, got a Linear"),
    ],
)
def test_mistakes_are_named(make, p, error, message):
    with pytest.raises(error, match=message):
        tensor_dropout_(make(), p)


def test_a_kept_weight_has_no_mask():
    """Monte Carlo dropout: the layer is in evaluation mode, its factorization in training mode."""
    torch.manual_seed(0)
    layer = TensorizedLinear(8, 8, factorization="cp", rank=40, implementation="reconstruct")
    x = torch.randn(3, 8)
    tensor_dropout_(layer, 0.5).eval()
    with torch.no_grad():
        expected = layer(x)
        layer.factorization.train()
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), expected)


def test_dense_layers_are_made_of_the_cores_without_masks():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, bias=False)
    cores = TensorizedWeight((24, 8), factorization="tt", rank=2)
    nn.utils.parametrize.register_parametrization(attention, "in_proj_weight", cores)
    model = nn.ModuleList([TensorizedLinear(8, 8, factorization="tt", rank=3), attention])
    expected = [model[0].weight.detach().clone(), model[1].in_proj_weight.detach().clone()]
    tensor_dropout_(model, 0.5)
    assert not torch.equal(model[1].in_proj_weight, expected[1])
    assert model[0].to_dense().weight.equal(expected[0])
    assert model[0].factorization.dropout == 0.5
    fold_(model)
    assert model[0].weight.equal(expected[0])
    assert model[1].in_proj_weight.equal(expected[1])


def test_it_compiles():
    torch.manual_seed(0)
    torch._dynamo.reset()
    for implementation in ("reconstruct", "contract"):
        layer = TensorRegression((3, 4), (5,), factorization="tucker", rank=3, implementation=implementation)
        tensor_dropout_(layer, 0.5)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 3, 4)
        compiled(x).sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    weight = tensor_dropout_(of_format("tr", 3), 0.5).to(dtype)
    assert {core.dtype for core in weight.operands} == {dtype}
    assert weight.reconstruct().dtype == dtype


# --- training ---------------------------------------------------------------------------------------------------------


def trained(sam: SAM | None) -> Regression:
    torch.manual_seed(1)
    model = tensor_dropout_(Regression(optimizer=sgd(), sam=sam), 0.5)
    trainer(max_epochs=2).fit(model, Batches(), Batches(seed=9))
    return model


def test_both_passes_of_sam_see_the_same_masks(monkeypatch):
    drawn, draw = [], masks.draw_mask

    def noted(*args):
        drawn.append(draw(*args).flatten().tolist())
        return torch.tensor(drawn[-1]).reshape(args[0])

    monkeypatch.setattr(masks, "draw_mask", noted)
    trained(SAM(rho=0.1))
    passes = [drawn[k : k + 2] for k in range(0, len(drawn), 2)]  # a Tucker matrix has two bonds
    assert len(passes) == 16
    assert passes[::2] == passes[1::2]
    assert len({str(each) for each in passes}) > 4
    monkeypatch.undo()
    assert_same_weights(trained(SAM(rho=0)), trained(None))


def test_groups_hold_the_parameters():
    model = tensor_dropout_(Regression(optimizer=sgd()), 0.5)
    (group,) = find_core_groups(model)
    assert all(core is own for core, own in zip(group.cores, model.weight.cores, strict=True))
