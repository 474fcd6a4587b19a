"""All that a data module of texts knows once its files are read."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from tenzoo.data.text.batches import Texts
from tenzoo.data.text.cache import cache_key, cached_tokens
from tenzoo.data.text.columns import Template, find_columns, read_texts
from tenzoo.data.text.labels import Labels
from tenzoo.data.text.tables import Table
from tenzoo.data.text.tokens import Tokens, check_room, load_tokenizer, tokenize, tokenizer_fingerprint


@dataclass(frozen=True, eq=False)
class PreparedTexts:
    """All that is known once the data is loaded.

    Args:
        splits: ``train``, ``val``, ``test`` and ``predict``, those that there are.
        labels: What the labels mean.
        tokenizer: Of transformers.
        fingerprint: Builtins that tell what is trained on and validated with from any other.
    """

    splits: dict[str, Texts]
    labels: Labels
    tokenizer: Any
    fingerprint: dict[str, Any]


class Tokenization:
    """Makes tokens of the texts of tables, with a cache.

    Args:
        tokenizer: A path or a name on the hub.
        columns: Those of text; ``None`` finds them in the first table.
        label: The column of labels.
        template: Makes one text of columns.
        max_length: Tokens per text.
        cache: Folder of the cache.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the tokenizer cannot be loaded or used, or takes fewer tokens than ``max_length``.
    """

    def __init__(
        self,
        tokenizer: str,
        *,
        columns: Sequence[str] | None,
        label: str,
        template: Template | None,
        max_length: int,
        cache: Path,
    ) -> None:
        self.tokenizer = load_tokenizer(tokenizer)
        limit = self.tokenizer.model_max_length
        if max_length > limit:
            raise ValueError(f"expected at most the {limit} tokens of {tokenizer!r} in `max_length`, got {max_length}")
        self._vocabulary = max(self.tokenizer.get_vocab().values()) + 1
        self._fingerprint = tokenizer_fingerprint(self.tokenizer)
        self._columns = columns if template is None else template.columns
        self._label = label
        self._template = template
        self._max_length = max_length
        self._cache = cache

    def tokens(self, table: Table) -> Tokens:
        """The tokens of a table.

        Raises:
            ValueError: If a column is missing, a cell is empty, a text has no tokens, or ``max_length`` leaves none.
        """
        if self._columns is None:
            self._columns = find_columns(table, label=self._label)
            rank_zero_info(f"texts of {table.source} are its columns {', '.join(self._columns)}")
        texts = read_texts(table, self._columns, arg="text" if self._template is None else "template")
        check_room(self.tokenizer, self._max_length, num_texts=len(texts) if self._template is None else 1)
        settings = json.dumps([self._fingerprint, self._max_length, [*self._columns], repr(self._template)])
        return cached_tokens(
            self._cache,
            cache_key(texts, settings),
            lambda: tokenize(
                self.tokenizer, texts, max_length=self._max_length, template=self._template, place=table.place
            ),
            count=len(table),
            vocabulary=self._vocabulary,
        )


def checksum(texts: Texts) -> str:
    """A checksum of tokens and labels."""
    digest = hashlib.blake2b(digest_size=16)
    texts.tokens.update(digest)
    labels: Tensor | None = texts.labels
    digest.update(b"" if labels is None else labels.numpy().tobytes())
    return digest.hexdigest()
