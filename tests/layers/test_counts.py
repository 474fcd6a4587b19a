"""Multiplications as they are counted in advance, and as torch counts them while a layer runs."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tenzoo.compression import apply_, plan, restore_
from tenzoo.layers import TensorizedConv2d, TensorizedLayer
from tests.factorizations.formats import NAMES
from tests.layers.makers import LAYERS

CONVOLUTIONS = {
    "same": ({"kernel_size": 3, "padding": 1}, (8, 8)),
    "valid": ({"kernel_size": 5}, (12, 12)),
    "nearly all of the image": ({"kernel_size": 9}, (10, 9)),
    "dilated": ({"kernel_size": 3, "dilation": 3}, (10, 9)),
    "wide margins": ({"kernel_size": 3, "padding": 4}, (5, 8)),
    "odd size, strided": ({"kernel_size": 3, "stride": 2, "padding": 1}, (7, 7)),
    "even size, strided": ({"kernel_size": 3, "stride": 2, "padding": 1}, (8, 8)),
    "strided and dilated": ({"kernel_size": 3, "stride": 2, "dilation": 2, "padding": (1, 2)}, (9, 12)),
    "pixel": ({"kernel_size": 1}, (6, 5)),
    "strided pixel": ({"kernel_size": 1, "stride": 2}, (7, 8)),
    "pixel with margins": ({"kernel_size": 1, "padding": (1, 0)}, (6, 6)),
    "patches": ({"kernel_size": 2, "stride": 2}, (8, 6)),
    "patches and a rest": ({"kernel_size": 4, "stride": 4}, (15, 10)),
    "row": ({"kernel_size": (1, 5), "padding": (0, 2)}, (6, 9)),
    "column": ({"kernel_size": (5, 1), "stride": (1, 3)}, (9, 8)),
    "even kernel": ({"kernel_size": (2, 4), "padding": (1, 2)}, (6, 7)),
    "same by name": ({"kernel_size": (3, 5), "padding": "same", "dilation": 2}, (6, 7)),
    "groups": ({"kernel_size": 3, "groups": 2, "stride": 2}, (9, 9)),
    "grouped pixel": ({"kernel_size": 1, "groups": 4, "stride": (2, 1)}, (5, 5)),
    "circular": ({"kernel_size": 3, "padding": 2, "padding_mode": "circular"}, (6, 5)),
    "reflected": ({"kernel_size": (3, 2), "padding": "same", "padding_mode": "reflect"}, (6, 5)),
    "large kernel": ({"kernel_size": 11, "stride": 4, "padding": 2}, (31, 35)),
}


def counted(function, *args):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops() / 2


def assert_counts(layer, x):
    layer.implementation = "reconstruct"
    expected = layer.costs.reconstruct + layer.costs.dense.at(layer.positions(x))
    assert expected.multiplications == pytest.approx(counted(layer, x), rel=1e-9)
    layer.implementation = "contract"
    assert layer.costs.contract.at(layer.positions(x)).multiplications == pytest.approx(counted(layer, x), rel=1e-9)


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_multiplications_of_a_convolution_are_those_that_torch_counts(name, case):
    arguments, side = CONVOLUTIONS[case]
    layer = TensorizedConv2d(8, 12, **arguments, factorization=name, rank=3)
    for shape in ((3, 8, *side), (8, *side)):
        x = torch.randn(shape)
        outputs = layer.positions(x).outputs
        assert outputs == layer(x).numel() / 12
        assert_counts(layer, x)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("name", NAMES)
def test_multiplications_of_other_layers_are_those_that_torch_counts(name, kind):
    make, data = LAYERS[kind]
    assert_counts(make(name), data(torch.float32))


def network(case):
    arguments, side = CONVOLUTIONS[case]
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 64, **arguments), nn.ReLU(), nn.Conv2d(64, 32, 1)), (16, *side)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", [case for case in CONVOLUTIONS if "group" not in case])
def test_a_budget_of_multiplications_holds_for_what_torch_counts(case):
    model, shape = network(case)
    dense = counted(model, torch.randn(1, *shape))
    made = plan(
        model, factorization="tucker", budget=0.6, count="multiplications", example_input=torch.randn(2, *shape)
    )
    assert made.dense_multiplications == dense
    assert any(layer.rank for layer in made.layers)
    small = apply_(copy.deepcopy(model), made)
    restored = restore_(copy.deepcopy(model), made, small.state_dict())
    for each in (small, restored):
        one, two = (counted(each.to("meta"), torch.empty(number, *shape, device="meta")) for number in (1, 2))
        assert made.multiplications == two - one <= 0.6 * dense


def test_a_budget_of_parameters_leaves_the_way_open():
    model, shape = network("same")
    made = plan(model, factorization="tucker", budget=0.6, example_input=torch.randn(2, *shape))
    assert {layer.implementation for layer in apply_(model, made) if isinstance(layer, TensorizedLayer)} == {"auto"}
