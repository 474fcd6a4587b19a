"""Writing what was predicted."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override


class _Writer(BasePredictionWriter):
    """Writes all predictions to one file in the log directory, at the end.

    An existing file is never overwritten: a number is appended to the name. Under DDP every rank predicts everything
    and the first one writes.
    """

    _what: ClassVar[str]
    """What a prediction is called, in the plural."""

    def __init__(self, name: str) -> None:
        super().__init__(write_interval="epoch")
        if Path(name).suffix not in (".npz", ".csv"):
            raise ValueError(f"expected a file name ending in .npz or .csv in `name`, got {name!r}")
        self.name = name

    @abstractmethod
    def _arrays(self, predictions: Sequence[Any]) -> Mapping[str, Tensor]:
        """The batches of predictions as arrays ``(n,)`` or ``(n, m)`` by name."""

    @abstractmethod
    def _columns(self, name: str, count: int) -> list[str]:
        """What the m columns of an array are called."""

    @override
    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        if not trainer.is_global_zero:
            return
        path = _unused(Path(trainer.log_dir or trainer.default_root_dir) / self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: array.cpu().numpy() for name, array in self._arrays(predictions).items()}
        if path.suffix == ".npz":
            np.savez(path, **arrays)  # type: ignore[arg-type]
        else:
            columns, forms = [], []
            for name, array in arrays.items():
                names = self._columns(name, array.shape[1] if array.ndim > 1 else 1)
                columns += names
                forms += ["%d" if np.issubdtype(array.dtype, np.integer) else "%.9g"] * len(names)
            table = np.column_stack(list(arrays.values()))
            np.savetxt(path, table, forms, ",", header=",".join(columns), comments="")
        rank_zero_info(f"wrote {len(next(iter(arrays.values())))} {self._what} to {path}")


class CompletedEntriesWriter(_Writer):
    """Write the completed entries to ``completed.npz`` in the log directory: ``indices`` (n, order), ``values`` (n,).

    An existing file is never overwritten: a number is appended to the name. Under DDP every rank predicts all entries
    and the first one writes.

    Args:
        name: File name, or a path of your own. ``.csv`` writes a text file of indices and values.

    Raises:
        ValueError: For a name that ends in neither ``.npz`` nor ``.csv``.

    Example:
        >>> CompletedEntriesWriter("completed.txt")
        Traceback (most recent call last):
        ...
        ValueError: expected a file name ending in .npz or .csv in `name`, got 'completed.txt'
    """

    _what: ClassVar[str] = "completed entries"

    def __init__(self, name: str = "completed.npz") -> None:
        super().__init__(name)

    @override
    def _arrays(self, predictions: Sequence[Any]) -> Mapping[str, Tensor]:
        return {
            "indices": torch.cat([batch.index for batch in predictions]),
            "values": torch.cat([batch.value for batch in predictions]),
        }

    @override
    def _columns(self, name: str, count: int) -> list[str]:
        return ["value"] if name == "values" else [f"i{mode}" for mode in range(count)]


class PredictedClassesWriter(_Writer):
    """Write the predicted classes to ``classes.npz`` in the log directory: ``classes`` (n,), ``probabilities`` (n, C).

    The images come in the order of the data. An existing file is never overwritten: a number is appended to the name.
    Under DDP every rank predicts all images and the first one writes.

    Args:
        name: File name, or a path of your own. ``.csv`` writes a text file of classes and probabilities.

    Raises:
        ValueError: For a name that ends in neither ``.npz`` nor ``.csv``.

    Example:
        >>> PredictedClassesWriter().name
        'classes.npz'
    """

    _what: ClassVar[str] = "predicted classes"

    def __init__(self, name: str = "classes.npz") -> None:
        super().__init__(name)

    @override
    def _arrays(self, predictions: Sequence[Any]) -> Mapping[str, Tensor]:
        probabilities = torch.cat(list(predictions))
        return {"classes": probabilities.argmax(1), "probabilities": probabilities}

    @override
    def _columns(self, name: str, count: int) -> list[str]:
        return ["class"] if name == "classes" else [f"p{k}" for k in range(count)]


def _unused(path: Path) -> Path:
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
