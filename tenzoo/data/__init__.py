"""Data modules: each gives batches of one task, split by seed and checked before training."""

from tenzoo.data.cifar10 import CIFAR10DataModule
from tenzoo.data.completion import CompletionDataModule
from tenzoo.data.entries import CompletionBatch, Entries
from tenzoo.data.images import ImageBatch, ImageLoader, Images, SequentialImageLoader
from tenzoo.data.label_noise import AsymmetricNoise, HumanNoise, LabelNoise, MatrixNoise, SymmetricNoise
from tenzoo.data.loader import EntryLoader, SequentialLoader

__all__ = [
    "AsymmetricNoise",
    "CIFAR10DataModule",
    "CompletionBatch",
    "CompletionDataModule",
    "Entries",
    "EntryLoader",
    "HumanNoise",
    "ImageBatch",
    "ImageLoader",
    "Images",
    "LabelNoise",
    "MatrixNoise",
    "SequentialImageLoader",
    "SequentialLoader",
    "SymmetricNoise",
]
