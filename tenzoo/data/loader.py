"""Streams of batches: shuffled and resumable for training, in order for evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from tenzoo.data.checks import check_int
from tenzoo.data.transfer import upload

_SHUFFLE_STREAM = 0x54FF1E

Batch = TypeVar("Batch")


class Share(NamedTuple, Generic[Batch]):
    """The part of a batch that belongs to one of several processes."""

    batch: Batch
    """Its items."""
    weight: float
    """The number of its items, divided by the average number per process. The mean over a share, multiplied by its
    weight and averaged over the processes, is the mean over the batch. The weight is 0 for an item of another rank."""
    items_per_process: float
    """The average number of items of a share."""


class ShuffledLoader(ABC, Generic[Batch]):
    """An endless, resumable stream of training batches, divided into epochs of ``len(loader)`` batches.

    Batch t of the stream is a pure function of ``(seed, t)``: the items are permuted, the permutation is cut into
    batches (the last one may be smaller), then comes the next permutation, itself a pure function of the seed and its
    number. An epoch takes the next ``len(loader)`` batches after the last one, so ``steps_per_epoch`` may end within a
    permutation or span several of them. The state is two integers.

    With several processes each batch of the stream is divided among them: rank r takes items r, r + w, r + 2w, … of
    it. Some ranks then have one item more than others, so each gets a :class:`Share` with its weight. A rank without
    an item of its own gets one of another rank, with weight 0: no batch is ever empty.

    Items are numbers from 0 to ``count - 1``. A subclass makes a batch of them in ``_batch``.

    This is not a ``torch.utils.data.DataLoader`` with this stream as its sampler and ``batch_size=None``, for two
    reasons. Lightning replaces the sampler of every such loader, with one that draws single items, under DDP and with
    ``overfit_batches``. And it takes longer. One batch took, in µs on one core of an Intel Xeon, each the median of
    epochs of both in turn, with torch 2.14:

    ================================  =======  ==========
    batch                                this  DataLoader
    ================================  =======  ==========
    full batch, 25 an epoch               0.1         6.1
    64 entries of order 3                 7.6        15.0
    1024 entries, 8 batches an epoch       26          38
    4096 entries, 2 batches an epoch       93         128
    65,536 entries of order 4           3,630       3,680
    128 images of CIFAR-10                272         295
    ================================  =======  ==========

    Args:
        count: Number of items, at least 1.
        batch_size: Items per batch over all ranks together; ``None`` means all of them.
        steps_per_epoch: Batches per epoch; ``None`` means one permutation.
        seed: Chooses the permutations.
        rank: Number of this process.
        world_size: Number of processes.
        in_flight: Returns how many batches were yielded and are not trained on yet, when a state is read. A resumed
            run gets them again.
        device: Where batches are made; ``None`` is the CPU.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If a count is out of range.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int | None = None,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        in_flight: Callable[[], int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._count = check_int(count, arg="count", least=1)
        size = None if batch_size is None else check_int(batch_size, arg="batch_size", least=1)
        self._batch_size = count if size is None else min(size, count)
        self._num_batches = -(-count // self._batch_size)
        steps = None if steps_per_epoch is None else check_int(steps_per_epoch, arg="steps_per_epoch", least=1)
        self._length = self._num_batches if steps is None else steps
        self._seed = check_int(seed, arg="seed", least=0)
        self._world_size = check_int(world_size, arg="world_size", least=1)
        self._rank = check_int(rank, arg="rank", least=0)
        if rank >= world_size:
            raise ValueError(
                f"expected less than `world_size` ({world_size}) in `rank`, got {rank}; count ranks from 0"
            )
        self._in_flight = in_flight
        self._device = torch.device("cpu") if device is None else device
        self._step = 0
        self.num_repeated: int | None = None
        """How many batches of the stream are repeated, to overfit them; None repeats nothing."""
        self._permutation: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._length

    def __iter__(self) -> Iterator[Batch | Share[Batch]]:
        for _ in range(self._length):
            step = self._step if self.num_repeated is None else self._step % self.num_repeated
            self._step += 1  # before the yield: a checkpoint is written while this batch is the last one yielded
            batch = self._batch(step)
            yield batch if self._world_size == 1 else Share(batch, *self._sizes(step))

    def state_dict(self) -> dict[str, int]:
        """The place in the stream: the permutation, and its next batch."""
        step = self._step - (0 if self._in_flight is None else self._in_flight())
        permutation, batch = divmod(max(step, 0), self._num_batches)
        return {"permutation": permutation, "batch": batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Moves to a place in the stream. The next epoch begins there, and has ``len(loader)`` batches.

        With another ``batch_size`` the stream continues in the same permutation, or at its end.

        Raises:
            ValueError: If it is not the state of such a loader.
        """
        if not isinstance(state_dict, dict) or set(state_dict) != {"permutation", "batch"}:
            raise ValueError(
                f"expected the keys 'permutation' and 'batch' in `state_dict`, got {state_dict!r}; "
                "give what state_dict() returned"
            )
        permutation = check_int(state_dict["permutation"], arg="state_dict['permutation']", least=0)
        batch = check_int(state_dict["batch"], arg="state_dict['batch']", least=0)
        self._step = permutation * self._num_batches + min(batch, self._num_batches)

    @abstractmethod
    def _batch(self, step: int) -> Batch:
        """This rank's share of a batch of the stream."""

    def _rows(self, step: int) -> Tensor:
        """The items of a batch of the stream, of all ranks, in their order."""
        number, position = divmod(step, self._num_batches)
        start = position * self._batch_size
        return self._permuted(number)[start : start + self._batch_size]

    def _permuted(self, number: int) -> Tensor:
        if self._permutation is None or self._permutation[0] != number:
            generator = np.random.default_rng([self._seed, _SHUFFLE_STREAM, number])
            permutation = torch.from_numpy(generator.permutation(self._count))
            self._permutation = number, upload(permutation, self._device)
        return self._permutation[1]

    def _shard(self, rows: Tensor) -> Tensor:
        if self._world_size == 1:
            return rows
        return rows[self._rank :: self._world_size] if self._rank < len(rows) else rows[:1]

    def _sizes(self, step: int) -> tuple[float, float]:
        """Weight of this process's share, and average number of items per process."""
        size = min(self._batch_size, self._count - step % self._num_batches * self._batch_size)
        own = len(range(self._rank, size, self._world_size))
        return own * self._world_size / size, size / self._world_size


class OrderedLoader(ABC, Generic[Batch]):
    """All items in their order; every iteration starts from the first.

    With several processes each of them sees all items. So each item counts equally in any metric, whether the
    metric is reduced over the processes or not, and no process has an empty batch.

    Args:
        count: Number of items.
        batch_size: Items per batch.

    Raises:
        TypeError: If ``batch_size`` is not an integer.
        ValueError: If ``batch_size`` is below 1.
    """

    def __init__(self, count: int, *, batch_size: int) -> None:
        self._count = count
        self._batch_size = check_int(batch_size, arg="batch_size", least=1)

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self._count, self._batch_size):
            yield self._batch(slice(start, start + self._batch_size))

    @abstractmethod
    def _batch(self, rows: slice) -> Batch:
        """The items of a range."""
