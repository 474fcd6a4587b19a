"""Checkpoints that appear whole or not at all."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from fsspec.utils import get_protocol  # type: ignore[import-untyped]
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from typing_extensions import override

from tenzoo.atomic import atomic_write, remove_leftovers


class CheckpointWriteError(OSError):
    """A checkpoint could not be written. The previous one is whole."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints as Lightning does, without its copy between file systems.

    Lightning writes into the folder for temporary files and then moves the file. Between two file systems that is a
    copy, and an interrupted copy leaves a broken ``last.ckpt``. This class writes the file in the folder of the
    checkpoint, flushes it to the disk and renames it. It removes files of earlier processes that were killed while
    they wrote. Every task uses it unless the Trainer was given another one. Lightning writes to remote file systems.
    """

    def __init__(self) -> None:
        self._seen: set[Path] = set()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointWriteError: If the disk is full, or the folder cannot be written to.
        """
        if storage_options is not None or get_protocol(str(path)) != "file":
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._tidy(path.parent)
            with atomic_write(path) as unfinished, unfinished.open("wb") as file:
                _save(checkpoint, file)
        except OSError as error:
            raise CheckpointWriteError(
                error.errno,
                f"expected a checkpoint that can be written, got {os.strerror(error.errno or 0)!r}; the previous "
                "checkpoint of this name is whole",
                str(path),
            ) from error

    @override
    def load_checkpoint(self, path: _PATH, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        if get_protocol(str(path)) == "file":
            self._tidy(Path(path).parent)
        return super().load_checkpoint(path, *args, **kwargs)

    def _tidy(self, folder: Path) -> None:
        if folder not in self._seen:
            self._seen.add(folder)
            remove_leftovers(folder)


class _Remembering:
    """A file that remembers why writing failed. Torch's writer raises another error afterwards."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    remembering = _Remembering(file)
    try:
        torch.save(checkpoint, remembering)  # type: ignore[arg-type]
    except RuntimeError:
        if remembering.error is None:
            raise
    if remembering.error is not None:
        raise remembering.error


def write_atomically(trainer: Trainer) -> None:
    """Let a Trainer write its checkpoints atomically, if it writes them in Lightning's usual way."""
    strategy = trainer.strategy
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
