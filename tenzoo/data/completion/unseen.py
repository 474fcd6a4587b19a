"""The cells of a tensor that are not trained on."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from typing_extensions import override

from tenzoo.data.completion.entries import CompletionBatch, Entries, cell_numbers
from tenzoo.data.completion.loaders import EVALUATION_BATCH_SIZE
from tenzoo.data.loader import OrderedLoader


class UnseenLoader(OrderedLoader[CompletionBatch]):
    """All cells of a tensor that are not trained on, in lexicographic order, with the values that are known.

    Batches are made one at a time, so memory grows with the known entries and not with the cells. Number the cells in
    lexicographic order, and let ``t_0 < t_1 < …`` be those that are trained on: ``t_i − i`` others come before ``t_i``,
    so the u-th of the others has the number u plus the count of all i with ``t_i − i ≤ u``.

    Args:
        shape: Mode sizes, of at most 2^63 − 1 cells.
        train: The entries that are trained on, in lexicographic order, each once.
        known: All known entries, in lexicographic order, each once.
        batch_size: Cells per batch.

    Example:
        >>> known = Entries(torch.tensor([[0, 1], [1, 0]]), torch.tensor([4.0, 5.0]))
        >>> loader = UnseenLoader((2, 2), known.take(torch.tensor([1])), known)
        >>> [(batch.index.tolist(), batch.value.tolist()) for batch in loader]
        [([[0, 0], [0, 1], [1, 1]], [nan, 4.0, nan])]
    """

    def __init__(
        self, shape: Sequence[int], train: Entries, known: Entries, *, batch_size: int = EVALUATION_BATCH_SIZE
    ) -> None:
        super().__init__(math.prod(shape) - len(train), batch_size=batch_size)
        self._shape = tuple(shape)
        trained_on = cell_numbers(train.index, self._shape)
        self._others_before = trained_on - np.arange(len(trained_on))
        self._known, self._value = cell_numbers(known.index, self._shape), known.value.numpy()

    @override
    def _batch(self, rows: slice) -> CompletionBatch:
        # NumPy searches several times faster than torch on one core.
        unseen = np.arange(rows.start, min(rows.stop, self._count))
        number = unseen + np.searchsorted(self._others_before, unseen, side="right")
        place = np.searchsorted(self._known, number).clip(max=len(self._known) - 1)
        value = np.where(self._known[place] == number, self._value[place], np.float32(math.nan))
        index = np.stack(np.unravel_index(number, self._shape), axis=1)
        return CompletionBatch(torch.from_numpy(index), torch.from_numpy(value))
