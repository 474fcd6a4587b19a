"""Patches: a layer's output is its weight times what it says it is multiplied by."""

import pytest
import torch

from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedLinear
from tests.factorizations.formats import NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
        {"kernel_size": 1, "groups": 2},
        {"kernel_size": 3, "groups": 2, "padding": 1, "padding_mode": "circular"},
    ],
)
def test_convolution(name, arguments):
    torch.manual_seed(0)
    layer = TensorizedConv2d(8, 6, bias=False, factorization=name, rank=2, dtype=torch.float64, **arguments)
    x = torch.randn(3, 8, 7, 6, dtype=torch.float64)
    y = layer(x)
    patches = layer.patches(x)
    groups = layer.groups
    rows = patches.reshape(3, -1, groups, patches[0].numel())
    weight = layer.factorization.reconstruct().reshape(groups, 6 // groups, -1)
    product = torch.einsum("nlgp,gop->ngol", rows, weight).reshape(y.shape)
    torch.testing.assert_close(product, y)
    first = layer.factorization.reconstruct().ndim - (patches.ndim - 1)
    assert tuple(patches.shape[1:]) == layer.factorization.shape[first:]


@pytest.mark.parametrize("name", NAMES)
def test_linear(name):
    torch.manual_seed(0)
    layer = TensorizedLinear(12, 8, bias=False, factorization=name, rank=2, dtype=torch.float64)
    x = torch.randn(3, 2, 12, dtype=torch.float64)
    patches = layer.patches(x)
    product = patches.flatten(1) @ layer.factorization.reconstruct().reshape(8, 12).t()
    torch.testing.assert_close(product.reshape(3, 2, 8), layer(x))


def test_an_embedding_multiplies_nothing():
    assert TensorizedEmbedding(20, 6, factorization="tt", rank=2).patches(torch.tensor([3])) is None
