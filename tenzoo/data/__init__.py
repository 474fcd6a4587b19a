"""Data modules: each gives batches of one task, split by seed and checked before training."""

from tenzoo.data.completion import CompletionBatch, CompletionDataModule, Entries, EntryLoader, SequentialLoader
from tenzoo.data.images import (
    AsymmetricNoise,
    CIFAR10DataModule,
    HumanNoise,
    ImageBatch,
    ImageLoader,
    Images,
    LabelNoise,
    MatrixNoise,
    SequentialImageLoader,
    SymmetricNoise,
)

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
