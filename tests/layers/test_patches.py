"""Patches: a layer's output is its weight times what it says it is multiplied by."""

import math

import pytest
import torch

from tenzoo.layers import (
    TensorizedConv1d,
    TensorizedConv2d,
    TensorizedConv3d,
    TensorizedEmbedding,
    TensorizedEmbeddingBag,
    TensorizedLinear,
)
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


ROWS = {
    "linear": (lambda **cores: TensorizedLinear(12, 8, bias=False, **cores), (3, 2, 12)),
    "convolution": (lambda **cores: TensorizedConv2d(8, 6, (3, 2), (2, 1), (1, 0), bias=False, **cores), (3, 8, 7, 6)),
    "one image": (lambda **cores: TensorizedConv2d(8, 6, 3, bias=False, **cores), (8, 7, 6)),
    "one dimension": (lambda **cores: TensorizedConv1d(8, 6, 3, bias=False, **cores), (3, 8, 7)),
    "three dimensions": (lambda **cores: TensorizedConv3d(4, 6, 2, bias=False, **cores), (2, 4, 3, 4, 3)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_the_output_belong_to_the_patches(kind, name):
    """The gradient of a weight is the sum of the products of both."""
    torch.manual_seed(0)
    make, shape = ROWS[kind]
    layer = make(factorization=name, rank=2, dtype=torch.float64)
    dense, x = layer.to_dense(), torch.randn(shape, dtype=torch.float64)
    y = dense(x)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, dense.weight, gradient)
    rows, patches = layer.output_rows(gradient), layer.patches(x)
    outputs = len(layer.tensorization[0])
    assert tuple(rows.shape[1:]) == layer.factorization.shape[:outputs]
    product = torch.tensordot(rows, patches, dims=([0], [0]))
    torch.testing.assert_close(product, layer.as_tensor(expected))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_output_belong_to_the_look_ups(name):
    torch.manual_seed(0)
    layer = TensorizedEmbedding(20, 6, padding_idx=3, factorization=name, rank=2, dtype=torch.float64)
    index, gradient = torch.randint(0, 20, (4, 5)), torch.randn(4, 5, 6, dtype=torch.float64)
    rows = layer.output_rows(gradient).flatten(1)
    sizes = rows.square().sum(1)
    found = layer.look_ups(index, sizes)
    expected = torch.zeros(math.prod(layer.tensorization[0]), dtype=torch.float64)
    expected.index_add_(0, index.flatten(), gradient.square().sum(-1).flatten())
    expected[3] = 0
    torch.testing.assert_close(found.flatten(), expected)
    assert found.shape == layer.tensorization[0]


def test_rows_of_the_output_that_belong_to_several_of_the_input():
    settings = {"factorization": "tt", "rank": 2}
    assert TensorizedConv2d(8, 6, 3, groups=2, **settings).output_rows(torch.ones(2, 6, 5, 5)) is None
    assert TensorizedEmbeddingBag(20, 6, **settings).output_rows(torch.ones(2, 6)) is None
