"""Running text for language models."""

from tenzoo.data.corpus.blocks import BlockLoader, WindowLoader
from tenzoo.data.corpus.datamodule import TextCorpusDataModule

__all__ = ["BlockLoader", "TextCorpusDataModule", "WindowLoader"]
