"""Labeled texts: their files, tokens and batches."""

from tenzoo.data.text.batches import Padding, SequentialTextLoader, TextBatch, TextLoader, Texts
from tenzoo.data.text.datamodule import TextDataModule
from tenzoo.data.text.tokens import Tokens

__all__ = ["Padding", "SequentialTextLoader", "TextBatch", "TextDataModule", "TextLoader", "Texts", "Tokens"]
