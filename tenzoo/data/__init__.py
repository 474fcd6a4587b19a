"""Data modules: each gives batches of one task, split by seed and checked before training."""

from tenzoo.data.completion import CompletionBatch, CompletionDataModule, Entries, EntryLoader, SequentialLoader
from tenzoo.data.corpus import BlockLoader, TextCorpusDataModule, WindowLoader
from tenzoo.data.images import (
    AsymmetricNoise,
    HumanNoise,
    ImageBatch,
    ImageDataModule,
    ImageLoader,
    Images,
    LabelNoise,
    MatrixNoise,
    SequentialImageLoader,
    SymmetricNoise,
)
from tenzoo.data.images.cifar10 import CIFAR10DataModule
from tenzoo.data.text import TextDataModule, TextLoader, Texts

__all__ = [
    "AsymmetricNoise",
    "BlockLoader",
    "CIFAR10DataModule",
    "CompletionBatch",
    "CompletionDataModule",
    "Entries",
    "EntryLoader",
    "HumanNoise",
    "ImageBatch",
    "ImageDataModule",
    "ImageLoader",
    "Images",
    "LabelNoise",
    "MatrixNoise",
    "SequentialImageLoader",
    "SequentialLoader",
    "SymmetricNoise",
    "TextCorpusDataModule",
    "TextDataModule",
    "TextLoader",
    "Texts",
    "WindowLoader",
]
