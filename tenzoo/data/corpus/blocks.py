"""Batches of blocks of running text: shuffled for training, in order for evaluation."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from tenzoo.data.loader import OrderedLoader, ShuffledLoader

Batch = dict[str, Tensor]
"""``tokens`` ``(N, T)``, and ``targets`` ``(N, T)``, the tokens that follow each, int64."""

IGNORED = -100
"""A target that does not count, as in :func:`torch.nn.functional.cross_entropy`."""

_SHIFT_STREAM = 0x5B1F7


class BlockLoader(ShuffledLoader[Batch]):
    """Training batches of blocks, an endless and resumable stream.

    See :class:`~tenzoo.data.loader.ShuffledLoader`. For each permutation the text is cut anew into blocks that follow
    each other: the first one begins at a place that the seed and the number of the permutation choose, so that blocks
    do not always begin in the same places.

    Args:
        tokens: The text, int32 ``(n,)``, with at least one token more than a block.
        context: Tokens of a block.
        batch_size: Blocks per batch over all ranks together.
        steps_per_epoch: Batches per epoch; ``None`` means each block once.
        seed: Chooses the permutations.
        rank: Number of this process.
        world_size: Number of processes.
        in_flight: Returns how many batches were yielded and are not trained on yet, when a state is read.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If a count is out of range.

    Example:
        >>> loader = BlockLoader(np.arange(9, dtype=np.int32), context=4, batch_size=1)
        >>> [(batch["targets"] - batch["tokens"]).tolist() for batch in loader]
        [[[1, 1, 1, 1]]]
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        *,
        context: int,
        batch_size: int,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        in_flight: Callable[[], int] | None = None,
    ) -> None:
        self._tokens, self._context = tokens, context
        count = max((len(tokens) - 1) // context - 1, 1)
        self._spare = len(tokens) - 1 - count * context
        super().__init__(
            count,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
            rank=rank,
            world_size=world_size,
            in_flight=in_flight,
        )

    @override
    def _batch(self, step: int) -> Batch:
        generator = np.random.default_rng([self._seed, _SHIFT_STREAM, step // self._num_batches])
        shift = int(generator.integers(0, self._spare, endpoint=True))
        starts = shift + self._shard(self._rows(step)).numpy() * self._context
        return _blocks(self._tokens, starts, self._context)


class WindowLoader(OrderedLoader[Batch]):
    """All targets of a text, each in one window of the context (see :class:`~tenzoo.data.loader.OrderedLoader`).

    Windows begin ``stride`` tokens after each other, and count the targets that no window before them has: with a
    stride below the context each of these has at least ``context - stride`` tokens before it. The last window ends with
    the text.

    Args:
        tokens: The text, int32 ``(n,)``, with two tokens or more.
        context: Tokens of a window; a shorter text is one window.
        stride: Tokens from one window to the next, at most the context.
        batch_size: Windows per batch.

    Raises:
        TypeError: If ``batch_size`` is not an integer.
        ValueError: If ``batch_size`` is below 1.

    Example:
        >>> loader = WindowLoader(np.arange(8, dtype=np.int32), context=4, stride=2, batch_size=1)
        >>> [batch["targets"].tolist() for batch in loader]
        [[[1, 2, 3, 4]], [[-100, -100, 5, 6]], [[-100, -100, -100, 7]]]
    """

    def __init__(self, tokens: npt.NDArray[np.int32], *, context: int, stride: int, batch_size: int) -> None:
        self._tokens = tokens
        self._context = min(context, len(tokens) - 1)
        last = len(tokens) - 1 - self._context
        self._starts = np.array([*range(0, last, stride), last])
        self._counted = np.array([0, *(self._starts[:-1] + self._context)])
        """The first target of each window that no window before it has."""
        super().__init__(len(self._starts), batch_size=batch_size)

    @override
    def _batch(self, rows: slice) -> Batch:
        starts = self._starts[rows]
        batch = _blocks(self._tokens, starts, self._context)
        seen = torch.from_numpy(starts[:, None] + np.arange(self._context)[None, :] < self._counted[rows, None])
        batch["targets"][seen] = IGNORED
        return batch


class PromptLoader(OrderedLoader[Batch]):
    """Prompts one by one, each a batch of ``tokens`` ``(1, T)``.

    Args:
        prompts: Tokens of each, int32 ``(T,)``.
    """

    def __init__(self, prompts: Sequence[npt.NDArray[np.int32]]) -> None:
        self._prompts = prompts
        super().__init__(len(prompts), batch_size=1)

    @override
    def _batch(self, rows: slice) -> Batch:
        return {"tokens": torch.from_numpy(self._prompts[rows.start].astype(np.int64))[None]}


def _blocks(tokens: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], context: int) -> Batch:
    places = starts[:, None] + np.arange(context + 1)[None, :]
    found = torch.from_numpy(tokens[places].astype(np.int64))
    return {"tokens": found[:, :-1].clone(), "targets": found[:, 1:].clone()}
