"""Tensor completion: data sets of indexed values, and the batches that are drawn from them."""

from tenzoo.data.completion.datamodule import CompletionDataModule
from tenzoo.data.completion.entries import CompletionBatch, Entries
from tenzoo.data.completion.loaders import EntryLoader, SequentialLoader
from tenzoo.data.completion.sources import DATASETS

__all__ = [
    "DATASETS",
    "CompletionBatch",
    "CompletionDataModule",
    "Entries",
    "EntryLoader",
    "SequentialLoader",
]
