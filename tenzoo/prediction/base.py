"""The base of callbacks that write predictions to a file."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, ClassVar, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from tenzoo.distributed import shared_out
from tenzoo.prediction.arrays import LIST_ENDINGS, Array, GrowingArrays


class Growing(Protocol):
    """Takes predictions batch by batch, and becomes a file at the end."""

    count: int

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Add rows."""

    def finish(self, columns: Mapping[str, Sequence[str]], words: Mapping[str, Sequence[str]] | None = None) -> Path:
        """Write the file."""

    def discard(self) -> None:
        """Delete the rows."""


class PredictionWriter(Callback):
    """Writes the predictions of all batches to one file in the log directory, which appears when it is complete.

    An existing file is never overwritten: a number is appended to the name. Under DDP every rank predicts everything
    and the first one writes.
    """

    endings: ClassVar[tuple[str, ...]] = LIST_ENDINGS
    """Of the files that it writes."""

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"expected a file name as str in `name`, got {name!r}")
        self._check_ending(name, "name")
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ValueError(
                f"expected a file name inside the log directory in `name`, got {name!r}; set trainer.default_root_dir "
                "to choose the folder"
            )
        self.name = name
        self._output: Path | None = None
        self._growing: Growing | None = None
        self._columns: dict[str, list[str]] = {}

    def write_to(self, output: str) -> None:
        """Write to this file, wherever it is, and not into the log directory.

        Raises:
            ValueError: If the name has another ending than those of :attr:`endings`.
        """
        self._check_ending(output, "output")
        self._output = Path(output)

    def _check_ending(self, name: str, arg: str) -> None:
        if Path(name).suffix not in self.endings:
            raise ValueError(f"expected a file name ending in {', '.join(self.endings)} in `{arg}`, got {name!r}")

    def _path(self, trainer: Trainer) -> Path:
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: asked on every rank
        return Path(folder) / self.name if self._output is None else self._output

    def _new(self, path: Path, trainer: Trainer) -> Growing:
        """What takes the predictions."""
        return GrowingArrays(path)

    @abstractmethod
    def _arrays(self, prediction: Any) -> Mapping[str, Tensor]:
        """A batch of predictions as arrays ``(n,)`` or ``(n, m)`` by name."""

    @abstractmethod
    def _column_names(self, name: str, count: int) -> list[str]:
        """The names of the m columns of an array."""

    @abstractmethod
    def _summary(self, trainer: Trainer, count: int) -> str:
        """A description of this many predictions, for a message."""

    def _note(self, batch: Any) -> None:
        """Called with each batch that was predicted."""

    def _words(self, trainer: Trainer) -> Mapping[str, Sequence[str]]:
        """For arrays of integers the word that each stands for."""
        return {}

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data that is divided among processes, and a folder that cannot be written to."""
        if any(map(shared_out, tree_leaves(trainer.predict_dataloaders))):
            raise ValueError(
                f"expected all data in every process for {type(self).__name__}, got a DataLoader that is divided among "
                f"{trainer.world_size}; set trainer.use_distributed_sampler: false, or trainer.devices: 1"
            )
        path = self._path(trainer)
        self._growing = self._new(path, trainer) if trainer.is_global_zero else None

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the predictions of a batch."""
        if self._growing is None:
            return
        arrays = {name: _to_numpy(array) for name, array in self._arrays(outputs).items()}
        for name, array in arrays.items():
            self._columns[name] = self._column_names(name, array.shape[1] if array.ndim > 1 else 1)
        self._growing.add(arrays)
        self._note(batch)

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if self._growing is not None and self._growing.count:
            count = self._growing.count
            path = self._growing.finish(self._columns, self._words(trainer))
            rank_zero_info(f"wrote {self._summary(trainer, count)} to {path}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Delete what was not written."""
        if self._growing is not None:
            self._growing.discard()


def _to_numpy(array: Tensor) -> Array:
    wide = array if not array.is_floating_point() else array.to(torch.promote_types(array.dtype, torch.float32))
    values: Array = wide.detach().cpu().numpy()  # numpy has no bfloat16
    return values
