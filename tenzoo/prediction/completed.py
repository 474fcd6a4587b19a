"""The callback that writes completed tensors."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from tenzoo.prediction.arrays import LIST_ENDINGS
from tenzoo.prediction.base import Growing, PredictionWriter
from tenzoo.prediction.cells import DENSE_ENDINGS, GrowingCells

_SPLITS = ("missing", "train", "validation", "held out")
"""What the numbers of ``split_of`` stand for."""


class CompletedEntriesWriter(PredictionWriter):
    """Write the completed entries to ``completed.npz`` in the log directory: ``indices`` (n, order), ``values`` (n,).

    An array ``known`` says where each entry lies: it is missing in the data, or in a split of the known ones; an
    ensemble has a further array ``deviations``. Of data with labels there is an array for each mode by its name, with
    the labels in ``{name}_names``; ``.csv`` and ``.parquet`` files have the labels themselves.

    ``.npy``, ``.pt``, ``.mat`` and ``.nc`` files hold the whole tensor: known values as they are, and the others
    completed.

    A message says how many of them are in cells without a known value, and how many such cells there are. An existing
    file is never overwritten: a number is appended to the name. Under DDP every rank predicts all entries and the first
    one writes.

    Args:
        name: File name.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: For a name with another ending, or one that leads out of the log directory; while predicting, for
            predictions that are not finite, and for a whole tensor where a choice of cells is predicted.
        OSError: While predicting, if the folder cannot be written to or the disk is full.

    Example:
        >>> CompletedEntriesWriter("completed.txt")
        Traceback (most recent call last):
        ...
        ValueError: expected a file name ending in .npz, .csv, .parquet, .npy, .pt, .mat, .nc in `name`, got \
'completed.txt'
    """

    endings: ClassVar[tuple[str, ...]] = (*LIST_ENDINGS, *DENSE_ENDINGS)

    def __init__(self, name: str = "completed.npz") -> None:
        super().__init__(name)
        self._missing = 0
        self._labels: dict[str, list[str]] = {}
        self._data: Any = None

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count cells without a known value."""
        self._missing, self._labels = 0, {}
        self._data = data = trainer.datamodule  # type: ignore[attr-defined]
        names, labels = (getattr(data, name, None) for name in ("mode_names", "labels"))
        if names is not None and labels is not None:
            self._labels = {name: [str(label) for label in known] for name, known in zip(names, labels, strict=True)}
        super().on_predict_start(trainer, pl_module)

    @override
    def _new(self, path: Path, trainer: Trainer) -> Growing:
        if path.suffix not in DENSE_ENDINGS:
            return super()._new(path, trainer)
        return GrowingCells(path, self._data)

    @override
    def _arrays(self, prediction: Any) -> Mapping[str, Tensor]:
        arrays = {"indices": prediction.index, "values": prediction.value}
        if self._labels:
            modes = zip(self._labels, prediction.index.unbind(1), strict=True)
            arrays = {**dict(modes), "values": prediction.value}
        if (deviation := getattr(prediction, "deviation", None)) is not None:
            arrays["deviations"] = deviation
        if hasattr(self._data, "split_of"):
            arrays["known"] = self._data.split_of(prediction.index)
        return {"indices": prediction.index, "values": prediction.value} if self._is_dense else arrays

    @property
    def _is_dense(self) -> bool:
        return isinstance(self._growing, GrowingCells)

    @override
    def _words(self, trainer: Trainer) -> Mapping[str, Sequence[str]]:
        return {**self._labels, **({"known": _SPLITS} if "known" in self._columns else {})}

    @override
    def _column_names(self, name: str, count: int) -> list[str]:
        if name in self._labels or name == "known":
            return [name]
        return [name.removesuffix("s")] if name in ("values", "deviations") else [f"i{mode}" for mode in range(count)]

    @override
    def _note(self, batch: Any) -> None:
        self._missing += int(batch.value.isnan().sum())

    @override
    def _summary(self, trainer: Trainer, count: int) -> str:
        shape, known = (getattr(self._data, name, None) for name in ("shape", "num_known"))
        if self._is_dense:
            return f"the whole tensor, {known} known entries as they are and {self._missing} completed,"
        of_all = "" if shape is None or known is None else f" (of {math.prod(shape) - known} in all)"
        return (
            f"{count} completed entries, {self._missing} of them in cells without a known value{of_all} and "
            f"{count - self._missing} in cells with one,"
        )
