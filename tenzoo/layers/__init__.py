"""Torch's layers with a weight that cores reconstruct.

Example:
    >>> import torch
    >>> layer = TensorizedConv2d(16, 32, 3, padding=1, factorization="tucker", rank=8)
    >>> x = torch.randn(2, 16, 8, 8)
    >>> torch.allclose(layer(x), layer.to_dense()(x), atol=1e-5)
    True
"""

from tenzoo.layers.base import TensorizedLayer
from tenzoo.layers.conv import TensorizedConv1d, TensorizedConv2d, TensorizedConv3d
from tenzoo.layers.conv_transpose import (
    TensorizedConvTranspose1d,
    TensorizedConvTranspose2d,
    TensorizedConvTranspose3d,
)
from tenzoo.layers.embedding import TensorizedEmbedding
from tenzoo.layers.embedding_bag import TensorizedEmbeddingBag
from tenzoo.layers.implementation import Implementation
from tenzoo.layers.linear import TensorizedLinear
from tenzoo.layers.parametrized import TensorizedWeight
from tenzoo.layers.regression import TensorContraction, TensorRegression
from tenzoo.layers.tensorization import Tensorization

__all__ = [
    "Implementation",
    "TensorContraction",
    "TensorRegression",
    "Tensorization",
    "TensorizedConv1d",
    "TensorizedConv2d",
    "TensorizedConv3d",
    "TensorizedConvTranspose1d",
    "TensorizedConvTranspose2d",
    "TensorizedConvTranspose3d",
    "TensorizedEmbedding",
    "TensorizedEmbeddingBag",
    "TensorizedLayer",
    "TensorizedLinear",
    "TensorizedWeight",
]
