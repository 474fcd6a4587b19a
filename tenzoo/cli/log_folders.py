"""The folders in which a run writes its logs."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fsspec.utils import get_protocol  # type: ignore[import-untyped]
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from tenzoo.distributed import is_first_process


class LogFolders:
    """Makes the folders for the logs of one run, and removes those it made where the run never trained."""

    def __init__(self) -> None:
        self._made: list[Path] = []
        self._around: list[Path] = []
        """Folders around them that were made as well, the innermost first."""

    def both_loggers(self, root: str) -> list[Logger]:
        """TensorBoard and CSV, in one new directory ``root/version_N``."""
        version = TensorBoardLogger(root, name="").version
        assert isinstance(version, int)
        if is_first_process():
            while not self._make(Path(root) / f"version_{version}"):  # another run may be about to do the same
                version += 1
        return [
            TensorBoardLogger(root, name="", version=version, default_hp_metric=False),
            CSVLogger(root, name="", version=version),
        ]

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
            if folder not in self._made and not self._make(folder) and any(folder.iterdir()):
                raise ValueError(
                    f"expected a folder for the logs of this run alone in `trainer.logger`, got {str(folder)!r}, which "
                    f"is not empty; give {type(logger).__name__} another `version`, or none to take the next free one"
                )

    def discard(self) -> None:
        """Remove the folders of a run that never trained: they were made before the input was checked."""
        for folder in self._made:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self._around:
            with suppress(OSError):  # it holds another run's by now
                folder.rmdir()

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
