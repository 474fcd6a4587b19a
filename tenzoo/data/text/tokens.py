"""Tokens of texts: one flat array of all, and where each text begins."""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from tenzoo.data.checks import MISSING_EXTRA
from tenzoo.data.text.columns import Template
from tenzoo.data.text.tables import brief

CHUNK = 1000
"""Texts that are tokenized in one call."""

_ENOUGH = 64
"""Tokens with which a text without any is told from the others."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of many texts.

    Args:
        ids: Of all texts, one after the other, int32.
        offsets: Where each text begins, and where the last one ends, int64, ``(n + 1,)``.
        types: The part of a pair that each token belongs to, uint8, as ``ids``; ``None`` where models do not ask.
    """

    ids: Array
    offsets: Array
    types: Array | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Array:
        """Number of tokens of each text, int64, ``(n,)``."""
        return np.diff(self.offsets)

    @classmethod
    def join(cls, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> "Tokens":
        """The tokens of these texts.

        Example:
            >>> Tokens.join([[5, 6], [7]]).offsets.tolist()
            [0, 2, 3]
        """
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        return cls(_flat(texts, np.int32), offsets, None if types is None else _flat(types, np.uint8))

    def take(self, rows: Array) -> "Tokens":
        """The tokens of some texts, copied."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        where = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Tokens(self.ids[where], offsets, None if self.types is None else self.types[where])

    def update(self, digest: "hashlib.blake2b") -> None:
        """Feed all numbers to a checksum."""
        for array in (self.ids, self.offsets, self.types):
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())

    @override
    def __repr__(self) -> str:
        return f"Tokens({len(self.ids)} of {len(self)} texts)"


def load_tokenizer(path: str) -> Any:
    """A tokenizer of transformers.

    Args:
        path: A folder, a GGUF file, or a name on the hub.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If there is no such tokenizer, or it has no pad token.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(f"expected transformers for `tokenizer`, which is not installed; {MISSING_EXTRA}") from error
    file = Path(path)
    where = (str(file.parent), {"gguf_file": file.name}) if file.suffix == ".gguf" else (path, {})
    tokenizer: Any = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(where[0], **where[1])
    except Exception as error:  # of many kinds: of the hub, of the network, of each file format
        reason = brief(error)
    if tokenizer is None:  # not within `except`: an error that it led to is taken for one of the user's own code
        raise ValueError(
            "expected the folder of a tokenizer, a GGUF file, or a name on the hub, in `tokenizer`, got "
            f"{path!r}: {reason}"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"expected a tokenizer with a pad token in `tokenizer`, got {path!r} with none; save it again with its "
            "`pad_token` set"
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A checksum of all files of a tokenizer, and of the versions that read them."""
    import tokenizers
    import transformers

    digest = hashlib.blake2b(f"{transformers.__version__} {tokenizers.__version__}".encode(), digest_size=16)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def tokenize(
    tokenizer: Any,
    texts: Sequence[Sequence[str]],
    *,
    max_length: int,
    template: Template | None,
    place: Callable[[int], str],
) -> Tokens:
    """The tokens of texts, at most ``max_length`` each.

    Longer texts lose tokens as the tokenizer is set to; with a template the cells are cut, and the template stays.

    Args:
        tokenizer: Of transformers.
        texts: One or two columns of ``n`` cells; with a template one per place of it.
        max_length: Tokens per text, those that the tokenizer adds included.
        template: Makes one text of the cells.
        place: Where a row is, for errors.

    Raises:
        ValueError: If a cell has no tokens of its own, or the template alone is too long.
    """
    ids: list[list[int]] = []
    types: list[list[int]] = []
    for start in range(0, len(texts[0]), CHUNK):
        cells = [column[start : start + CHUNK] for column in texts]
        if template is None:
            encoded = _encode(tokenizer, *cells, max_length=max_length)
        else:
            encoded = _fill(tokenizer, cells, template, max_length)
        alone = template is None and len(cells) == 1
        empty = _without_tokens(tokenizer, encoded["input_ids"]) if alone else _first_empty_cell(tokenizer, cells)
        if empty is not None:
            where = place(start + empty)
            raise ValueError(f"expected a text with tokens in {where}, got none that the tokenizer knows")
        ids += encoded["input_ids"]
        types += encoded.get("token_type_ids", [])
    return Tokens.join(ids, types or None)


def check_room(tokenizer: Any, max_length: int, *, num_texts: int) -> None:
    """Refuse a number of tokens with which nothing is left of a text.

    Args:
        tokenizer: Of transformers.
        max_length: Tokens per text or pair.
        num_texts: 1, or 2 for pairs.

    Raises:
        ValueError: If it is too small; the tokenizer would cut nothing.
    """
    added = tokenizer.num_special_tokens_to_add(pair=num_texts == 2)
    if max_length < added + num_texts:
        raise ValueError(
            f"expected at least {added + num_texts} in `max_length`, {added} tokens that the tokenizer adds and one of "
            f"each text, got {max_length}"
        )


def _without_tokens(tokenizer: Any, ids: Sequence[Sequence[int]]) -> int | None:
    """The first text of which there is nothing but the tokens that are added to any."""
    added = tokenizer.num_special_tokens_to_add(pair=False)
    return next((row for row, text in enumerate(ids) if len(text) <= added), None)


def _first_empty_cell(tokenizer: Any, cells: Sequence[Sequence[str]]) -> int | None:
    """The first row of a pair or a template with a cell of which no tokens are made."""
    rows = [_without_tokens(tokenizer, _encode(tokenizer, column, max_length=_ENOUGH)["input_ids"]) for column in cells]
    return min((row for row in rows if row is not None), default=None)


def _encode(tokenizer: Any, *texts: Sequence[str], max_length: int) -> Any:
    columns = [list(column) for column in texts]
    return tokenizer(*columns, truncation=True, max_length=max_length, padding=False, return_attention_mask=False)


def _fill(tokenizer: Any, cells: Sequence[Sequence[str]], template: Template, max_length: int) -> Any:
    """Tokens of filled templates; of long texts each cell is cut to the same number of characters, the largest."""
    rows = list(zip(*cells, strict=True))
    keep_end = tokenizer.truncation_side == "left"

    def encode(which: Sequence[int], limits: Sequence[int]) -> Any:
        texts = []
        for index, limit in zip(which, limits, strict=True):
            cut = [cell[max(len(cell) - limit, 0) :] if keep_end else cell[:limit] for cell in rows[index]]
            texts.append(template.fill(dict(zip(template.columns, cut, strict=True))))
        return _encode(tokenizer, texts, max_length=max_length + 1)

    whole = [max(map(len, row)) for row in rows]
    encoded = encode(range(len(rows)), whole)
    long = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) > max_length]
    if not long:
        return encoded

    def fits(limits: Sequence[int]) -> Array:
        return np.array([len(ids) <= max_length for ids in encode(long, limits)["input_ids"]])

    cut = encode(long, _largest(fits, [whole[index] for index in long]))
    for key, lists in cut.items():
        for index, values in zip(long, lists, strict=True):
            encoded[key][index] = values
    return encoded


def _largest(fits: Callable[[Sequence[int]], Array], limits: Sequence[int]) -> list[int]:
    """The largest number below each limit that fits, by bisection."""
    good, bad = np.ones(len(limits), dtype=np.int64), np.array(limits)
    if not fits(good.tolist()).all():
        raise ValueError("expected room for more than the template alone in `max_length`; give a larger one")
    while (bad - good > 1).any():
        middle = (good + bad) // 2
        fit = fits(middle.tolist())
        good, bad = np.where(fit, middle, good), np.where(fit, bad, middle)
    return [int(limit) for limit in good]


def _flat(lists: Sequence[Sequence[int]], dtype: npt.DTypeLike) -> Array:
    parts = [np.asarray(part, dtype=dtype) for part in lists]
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
