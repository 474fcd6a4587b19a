"""Data modules: each gives batches of one task, split by seed and checked before training."""

from tenzoo.data.completion import CompletionDataModule
from tenzoo.data.entries import CompletionBatch, Entries
from tenzoo.data.loader import EntryLoader, SequentialLoader

__all__ = ["CompletionBatch", "CompletionDataModule", "Entries", "EntryLoader", "SequentialLoader"]
