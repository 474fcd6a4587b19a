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
from tenzoo.data.images.arrays import ImageArraysDataModule
from tenzoo.data.images.cifar10 import CIFAR10DataModule
from tenzoo.data.images.folder import ImageFolderDataModule
from tenzoo.data.images.public import CIFAR100DataModule, MNISTDataModule
from tenzoo.data.text import TextDataModule, TextLoader, Texts

__all__ = [
    "AsymmetricNoise",
    "BlockLoader",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CompletionBatch",
    "CompletionDataModule",
    "Entries",
    "EntryLoader",
    "HumanNoise",
    "ImageArraysDataModule",
    "ImageBatch",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageLoader",
    "Images",
    "LabelNoise",
    "MNISTDataModule",
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
