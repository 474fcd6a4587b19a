"""A small layer of each kind, and an input of it."""

import torch

import tests.hugging_face  # noqa: F401  (makes the class that the next import needs)
from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedLinear
from tenzoo.layers.hugging_face import TensorizedTransposedLinear


def conv(name="tr", rank=2, **kwargs):
    return TensorizedConv2d(6, 8, 3, padding=1, factorization=name, rank=rank, **kwargs)


def linear(name="tt", rank=2, **kwargs):
    return TensorizedLinear(12, 8, factorization=name, rank=rank, **kwargs)


def transposed(name="tt", rank=2, **kwargs):
    return TensorizedTransposedLinear(8, 12, factorization=name, rank=rank, **kwargs)


def embedding(name="tt", rank=2, **kwargs):
    return TensorizedEmbedding(20, 6, factorization=name, rank=rank, **kwargs)


LAYERS = {
    "conv": (conv, lambda dtype: torch.randn(2, 6, 5, 5, dtype=dtype)),
    "linear": (linear, lambda dtype: torch.randn(3, 12, dtype=dtype)),
    "transposed": (transposed, lambda dtype: torch.randn(3, 12, dtype=dtype)),
    "embedding": (embedding, lambda dtype: torch.randint(0, 20, (3, 2))),
}
