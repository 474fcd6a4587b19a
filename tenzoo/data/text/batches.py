"""Batches of tokenized texts: padded to their longest, and of similar lengths in training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from tenzoo.data.loader import OrderedLoader, ShuffledLoader
from tenzoo.data.text.tokens import Tokens
from tenzoo.data.transfer import upload

GROUPED_BATCHES = 50
"""Batches whose texts are sorted by length together."""

_ORDER_STREAM = 0x6A0E9


class Padding(NamedTuple):
    """How texts of a batch are made equally long.

    Args:
        token: The number of the pad token.
        type: The part of a pair that padding belongs to.
        left: Whether it stands before the text.
    """

    token: int
    type: int = 0
    left: bool = False


@dataclass(frozen=True, eq=False)
class Texts:
    """Tokenized texts and their labels.

    Args:
        tokens: Of ``n`` texts.
        labels: Shape ``(n,)``, int64 for classes, float32 for regression; ``None`` where there are none.
    """

    tokens: Tokens
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Tensor) -> "Texts":
        """The texts of these rows, shape ``(m,)``, int64, copied."""
        return Texts(self.tokens.take(rows.numpy()), None if self.labels is None else self.labels[rows])


class TextBatch:
    """The tensors of a batch, in a wrapper that keeps Lightning from rounding labels to half precision.

    Args:
        tensors: By name.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors


def pad_texts(texts: Texts, rows: Tensor, padding: Padding) -> dict[str, Tensor]:
    """A batch, padded to its longest text.

    Args:
        texts: All texts.
        rows: Which are in the batch, shape ``(N,)``, int64.
        padding: How they are padded.

    Returns:
        ``input_ids`` and ``attention_mask``, ``token_type_ids`` where the tokenizer gives them, all int64
        ``(N, length)``, and ``labels`` ``(N,)`` where there are any.

    Example:
        >>> batch = pad_texts(Texts(Tokens.join([[5, 6, 7], [8]])), torch.tensor([1, 0]), Padding(0))
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[8, 0, 0], [5, 6, 7]], [[1, 0, 0], [1, 1, 1]])
    """
    tokens, which = texts.tokens, rows.numpy()
    starts = tokens.offsets[which]
    lengths = tokens.offsets[which + 1] - starts
    longest = lengths.max()
    place = np.arange(longest)[None, :] - (longest - lengths[:, None] if padding.left else 0)
    mask = (place >= 0) & (place < lengths[:, None])
    where = np.where(mask, starts[:, None] + place, 0)
    arrays = {"input_ids": np.where(mask, tokens.ids[where], padding.token), "attention_mask": mask}
    if tokens.types is not None:
        arrays["token_type_ids"] = np.where(mask, tokens.types[where], padding.type)
    batch = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    if texts.labels is not None:
        batch["labels"] = texts.labels[rows]
    return batch


class TextLoader(ShuffledLoader[dict[str, Tensor] | TextBatch]):
    """Training batches of texts of similar lengths, an endless and resumable stream.

    See :class:`~tenzoo.data.loader.ShuffledLoader`. In each permutation, the texts of ``GROUPED_BATCHES`` batches are
    sorted by length and cut into batches, and all batches are then shuffled. The last, smaller batch is drawn from all
    texts alike.

    Args:
        texts: The texts to draw from.
        padding: How texts are padded.
        batch_size: Texts per batch over all ranks together.
        seed: Chooses the permutations.
        wrap: Whether batches are :class:`TextBatch` objects.
        rank: Number of this process.
        world_size: Number of processes.
        in_flight: Returns how many batches were yielded and are not trained on yet, when a state is read.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If there are no texts, or a count is out of range.

    Example:
        >>> loader = TextLoader(Texts(Tokens.join([[5, 6, 7], [8], [3, 4, 6], [9]])), Padding(0), batch_size=2)
        >>> sorted(tuple(batch["input_ids"].shape) for batch in loader)
        [(2, 1), (2, 3)]
    """

    def __init__(
        self,
        texts: Texts,
        padding: Padding,
        *,
        batch_size: int,
        seed: int = 0,
        wrap: bool = False,
        rank: int = 0,
        world_size: int = 1,
        in_flight: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(
            len(texts), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, in_flight=in_flight
        )
        self._texts = texts
        self._padding = padding
        self._wrap = wrap

    @override
    def _batch(self, step: int) -> dict[str, Tensor] | TextBatch:
        batch = pad_texts(self._texts, self._shard(self._rows(step)), self._padding)
        return TextBatch(batch) if self._wrap else batch

    @override
    def _permuted(self, number: int) -> Tensor:
        if self._permutation is None or self._permutation[0] != number:
            self._permutation = number, torch.from_numpy(self._grouped(number))
        return self._permutation[1]

    def _grouped(self, number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        generator = np.random.default_rng([self._seed, _ORDER_STREAM, number])
        order = generator.permutation(self._count)
        lengths = self._texts.tokens.lengths
        full = self._count // self._batch_size * self._batch_size
        for start in range(0, full, GROUPED_BATCHES * self._batch_size):
            group = order[start : min(start + GROUPED_BATCHES * self._batch_size, full)]
            group[:] = group[np.argsort(lengths[group], kind="stable")]
        batches = order[:full].reshape(-1, self._batch_size)
        order[:full] = batches[generator.permutation(len(batches))].reshape(-1)
        return order


class SequentialTextLoader(OrderedLoader[dict[str, Tensor] | TextBatch]):
    """All texts in their order, in each process (see :class:`~tenzoo.data.loader.OrderedLoader`).

    Args:
        texts: The texts to iterate over.
        padding: How texts are padded.
        batch_size: Texts per batch.
        wrap: Whether batches are :class:`TextBatch` objects.

    Raises:
        TypeError: If ``batch_size`` is not an integer.
        ValueError: If ``batch_size`` is below 1.

    Example:
        >>> loader = SequentialTextLoader(Texts(Tokens.join([[5, 6, 7], [8]])), Padding(0), batch_size=1)
        >>> [batch["input_ids"].tolist() for batch in loader]
        [[[5, 6, 7]], [[8]]]
    """

    def __init__(self, texts: Texts, padding: Padding, *, batch_size: int, wrap: bool = False) -> None:
        super().__init__(len(texts), batch_size=batch_size)
        self._texts = texts
        self._padding = padding
        self._wrap = wrap

    @override
    def _batch(self, rows: slice) -> dict[str, Tensor] | TextBatch:
        batch = pad_texts(self._texts, torch.arange(*rows.indices(len(self._texts))), self._padding)
        return TextBatch(batch) if self._wrap else batch


def upload_batch(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on a device."""
    return {name: upload(tensor, device) for name, tensor in batch.items()}
