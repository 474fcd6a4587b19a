"""A small layer of each kind, and an input of it."""

import torch

from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedLinear


def conv(name="tr", rank=2, **kwargs):
    return TensorizedConv2d(6, 8, 3, padding=1, factorization=name, rank=rank, **kwargs)


def linear(name="tt", rank=2, **kwargs):
    return TensorizedLinear(12, 8, factorization=name, rank=rank, **kwargs)


def embedding(name="tt", rank=2, **kwargs):
    return TensorizedEmbedding(20, 6, factorization=name, rank=rank, **kwargs)


LAYERS = {
    "conv": (conv, lambda dtype: torch.randn(2, 6, 5, 5, dtype=dtype)),
    "linear": (linear, lambda dtype: torch.randn(3, 12, dtype=dtype)),
    "embedding": (embedding, lambda dtype: torch.randint(0, 20, (3, 2))),
}
