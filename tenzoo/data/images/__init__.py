"""Labelled images: what all data sets of them share. ``tenzoo.data`` lists the data sets."""

from tenzoo.data.images.batches import (
    ImageBatch,
    ImageLoader,
    Images,
    SequentialImageLoader,
    augment_and_normalize,
)
from tenzoo.data.images.datamodule import ImageDataModule
from tenzoo.data.images.human_noise import HumanNoise
from tenzoo.data.images.label_noise import AsymmetricNoise, LabelNoise, MatrixNoise, SymmetricNoise

__all__ = [
    "AsymmetricNoise",
    "HumanNoise",
    "ImageBatch",
    "ImageDataModule",
    "ImageLoader",
    "Images",
    "LabelNoise",
    "MatrixNoise",
    "SequentialImageLoader",
    "SymmetricNoise",
    "augment_and_normalize",
]
