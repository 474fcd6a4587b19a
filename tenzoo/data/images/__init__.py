"""Labelled images: data sets, batches that are augmented as a whole, and wrong labels on purpose."""

from tenzoo.data.images.batches import (
    ImageBatch,
    ImageLoader,
    Images,
    SequentialImageLoader,
    augment_and_normalize,
)
from tenzoo.data.images.cifar10 import CIFAR10DataModule
from tenzoo.data.images.label_noise import AsymmetricNoise, HumanNoise, LabelNoise, MatrixNoise, SymmetricNoise

__all__ = [
    "AsymmetricNoise",
    "CIFAR10DataModule",
    "HumanNoise",
    "ImageBatch",
    "ImageLoader",
    "Images",
    "LabelNoise",
    "MatrixNoise",
    "SequentialImageLoader",
    "SymmetricNoise",
    "augment_and_normalize",
]
