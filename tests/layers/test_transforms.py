"""Convolutions under transforms of torch.func, where a tensor tells less of its memory than elsewhere."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from tenzoo.layers import TensorizedConv2d
from tests.factorizations.formats import NAMES
from tests.layers.makers import conv

WAYS = ["reconstruct", "contract", "auto"]


@pytest.mark.parametrize("settings", [{"groups": 2}, {"stride": 2}, {"padding_mode": "circular"}], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["plain", "channels_last"])
@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_convolution_does_the_same_under_vmap(name, implementation, last, settings):
    torch.manual_seed(0)
    layer = conv(name, implementation=implementation, dtype=torch.float64, **settings)
    images = torch.randn(6, 6, 5, 5, dtype=torch.float64)
    images = images.to(memory_format=torch.channels_last) if last else images
    expected = layer(images)
    for mode, parts in ((0, images.unflatten(0, (3, 2))), (1, images.unflatten(0, (2, 3)))):
        torch.testing.assert_close(vmap(layer, mode, mode)(parts).flatten(0, 1), expected)


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_per_sample_and_ensembles_of_a_convolution_in_channels_last(name, implementation):
    torch.manual_seed(0)
    layers = [
        TensorizedConv2d(4, 6, 3, factorization=name, rank=2, implementation=implementation).double() for _ in range(2)
    ]
    images = torch.randn(3, 2, 5, 5, 4, dtype=torch.float64).movedim(-1, 2)

    def loss(parameters, x):
        return functional_call(layers[0], parameters, x).square().sum()

    own = {key: value.detach() for key, value in layers[0].named_parameters()}
    per_sample = vmap(grad(loss), in_dims=(None, 0))(own, images)
    for k, x in enumerate(images):
        for key, value in grad(loss)(own, x).items():
            torch.testing.assert_close(per_sample[key][k], value)
    stacked, _ = stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0])
    found = vmap(lambda parameters: functional_call(skeleton, parameters, images[0]))(stacked)
    torch.testing.assert_close(found, torch.stack([layer(images[0]) for layer in layers]))


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_leave_the_layout_of_images(name, implementation):
    layer, layouts = conv(name, implementation=implementation), []

    def loss(x):
        y = layer(x)
        layouts.append(y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous())
        return y.square().sum()

    for x in (torch.randn(2, 6, 5, 7), torch.randn(2, 5, 7, 6).movedim(-1, 1)):
        grad(loss)(x)
    assert layouts == [False, True]
