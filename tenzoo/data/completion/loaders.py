"""Batches of tensor entries: shuffled and resumable for training, in order for evaluation."""

from collections.abc import Callable

import torch
from typing_extensions import override

from tenzoo.data.completion.entries import CompletionBatch, Entries
from tenzoo.data.loader import OrderedLoader, ShuffledLoader
from tenzoo.data.transfer import upload
from tenzoo.factorizations.gather import constant

EVALUATION_BATCH_SIZE = 65536
"""Entries per batch in evaluation, unless training batches are larger."""


class EntryLoader(ShuffledLoader[CompletionBatch]):
    """The training batches of a completion problem, an endless and resumable stream.

    See :class:`~tenzoo.data.loader.ShuffledLoader`. A batch is one indexing operation. If one batch holds all entries,
    nothing is permuted and each step yields the same tensors.

    Args:
        entries: What to draw from.
        batch_size: Entries per batch over all ranks together; ``None`` means all of them.
        steps_per_epoch: Batches per epoch; ``None`` means one permutation.
        seed: Chooses the permutations.
        rank: Number of this process.
        world_size: Number of processes.
        in_flight: Returns how many batches were yielded and are not trained on yet, when a state is read.
        device: Where the entries are stored and batches are made; ``None`` is the CPU.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If there are no entries, or a count is out of range.

    Example:
        >>> entries = Entries(torch.tensor([[0, 0], [0, 1], [1, 0]]), torch.tensor([1.0, 2.0, 3.0]))
        >>> loader = EntryLoader(entries, batch_size=2)
        >>> [batch.value.numel() for batch in loader]
        [2, 1]
        >>> loader.state_dict()
        {'permutation': 1, 'batch': 0}
        >>> sum(batch.value.sum().item() for batch in loader)  # one permutation holds each entry once
        6.0
    """

    def __init__(
        self,
        entries: Entries,
        *,
        batch_size: int | None = None,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        in_flight: Callable[[], int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if len(entries) == 0:
            raise ValueError("expected at least one entry in `entries`, got none")
        super().__init__(
            len(entries),
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
            rank=rank,
            world_size=world_size,
            in_flight=in_flight,
            device=device,
        )
        self._entries = entries = Entries(upload(entries.index, self._device), upload(entries.value, self._device))
        everything = entries if world_size == 1 else Entries(self._shard(entries.index), self._shard(entries.value))
        self._everything = CompletionBatch(constant(everything.index), everything.value)

    @override
    def _batch(self, step: int) -> CompletionBatch:
        if self._num_batches == 1:
            return self._everything
        rows = self._shard(self._rows(step))
        return CompletionBatch(self._entries.index[rows], self._entries.value[rows])


class SequentialLoader(OrderedLoader[CompletionBatch]):
    """All entries in their order, in large batches, in each process.

    See :class:`~tenzoo.data.loader.OrderedLoader`.

    Args:
        entries: What to iterate over.
        batch_size: Entries per batch.

    Raises:
        TypeError: If ``batch_size`` is not an integer.
        ValueError: If ``batch_size`` is below 1.

    Example:
        >>> loader = SequentialLoader(Entries(torch.zeros(3, 2).long(), torch.ones(3)), batch_size=2)
        >>> len(loader), [batch.value.tolist() for batch in loader]
        (2, [[1.0, 1.0], [1.0]])
    """

    def __init__(self, entries: Entries, *, batch_size: int = EVALUATION_BATCH_SIZE) -> None:
        super().__init__(len(entries), batch_size=batch_size)
        self._entries = entries

    @override
    def _batch(self, rows: slice) -> CompletionBatch:
        return CompletionBatch(self._entries.index[rows], self._entries.value[rows])
