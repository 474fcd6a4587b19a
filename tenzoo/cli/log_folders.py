"""The folders in which a run writes its logs."""

import fcntl
import itertools
import os
import re
import shutil
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fsspec.utils import get_protocol  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import (
    CometLogger,
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from typing_extensions import override

from tenzoo.cli.continued_logs import ContinuedCSVLogger, Resumed
from tenzoo.distributed import is_first_process

ELSEWHERE = (CometLogger, MLFlowLogger, WandbLogger)
"""Loggers that send metrics to a service: beside them a run has its folder and logs as always."""


class LogFolders:
    """Makes the folders for the logs of one run, and removes those it made where the run never trained."""

    def __init__(self) -> None:
        self._made: list[Path] = []
        self._around: list[Path] = []
        """Folders around them that were made as well, the innermost first."""
        self._lock: int | None = None
        self.own: list[Logger] = []
        """Loggers that were made here."""

    def new_run(self, parent: Path, *, command: str) -> list[Logger]:
        """Loggers of a run in a new folder, named by date and time: TensorBoard and CSV of a fit, CSV of others.

        Args:
            parent: The folder of the experiment.
            command: The name of the folder ends with it, unless it is ``fit``.
        """
        stamp, end = time.strftime("%Y-%m-%d_%H%M%S"), "" if command == "fit" else f"-{command}"
        name = f"{stamp}{end}"
        if is_first_process():
            names = itertools.chain([name], (f"{stamp}-{number}{end}" for number in itertools.count(1)))
            name = next(each for each in names if self._make(parent / each))  # another run may do the same now
        self.own = [CSVLogger(parent.parent, name=parent.name, version=name)]
        if command == "fit":
            board = TensorBoardLogger(parent.parent, name=parent.name, version=name, default_hp_metric=False)
            self.own.insert(0, board)
        return self.own

    def same_run(self, resumed: Resumed) -> list[Logger]:
        """Loggers that go on in the folder of a run.

        Raises:
            ValueError: If the run has not ended yet.
        """
        folder = resumed.folder
        # The checkpoints there are those of the run itself.
        warnings.filterwarnings("ignore", message=f"Checkpoint directory {re.escape(str(folder))}.* exists")
        if is_first_process():
            self._take(folder)
        board = TensorBoardLogger(
            folder.parents[1],
            name=folder.parent.name,
            version=folder.name,
            default_hp_metric=False,
            purge_step=resumed.step,
        )
        self.own = [board, ContinuedCSVLogger(resumed)]
        return self.own

    def claim(self, loggers: Sequence[Logger]) -> None:
        """Make the folders that loggers have for themselves; refuse one with other logs: CSVLogger would delete them.

        Raises:
            ValueError: Naming the folder.
        """
        if not is_first_process():
            return  # by now the first process may have begun to write there
        for logger in loggers:
            if not isinstance(logger, TensorBoardLogger | CSVLogger) or get_protocol(logger.log_dir) != "file":
                continue
            folder = Path(logger.log_dir)
            if logger in self.own:
                continue
            if folder not in self._made and not self._make(folder) and any(folder.iterdir()):
                raise ValueError(
                    f"expected a folder for the logs of this run alone in `trainer.logger`, got {str(folder)!r}, which "
                    f"is not empty; give {type(logger).__name__} another `version`, or none to take the next free one"
                )
        if self._lock is None and self._made:
            self._take(self._made[0])

    def discard(self) -> None:
        """Remove the folders of a run that never trained: they were made before the input was checked."""
        self.release()
        for folder in self._made:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self._around:
            with suppress(OSError):  # it holds another run's by now
                folder.rmdir()

    def release(self) -> None:
        """Let other processes go on in the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take(self, folder: Path) -> None:
        """Hold a folder until the end of the process, however it ends, where the file system can do that.

        Raises:
            ValueError: If another process holds it.
        """
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ValueError(
                f"expected a run that has ended in `ckpt_path`, got {str(folder)!r}, in which a process trains"
            ) from error
        except OSError:  # no locks there
            os.close(lock)
        else:
            self._lock = lock

    def _make(self, folder: Path) -> bool:
        """Make a folder; False if there is one already."""
        self._around = [*(parent for parent in folder.parents if not parent.exists()), *self._around]
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            return False
        self._made.append(folder)
        return True


class SameFolder(Callback):
    """Gives all processes the folder of the first one, which alone makes it, and looks at its own clock.

    Args:
        loggers: Those whose ``version`` is the folder.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = loggers

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for logger in self._loggers:
            assert isinstance(logger, TensorBoardLogger | CSVLogger)
            logger._version = trainer.strategy.broadcast(logger.version)
