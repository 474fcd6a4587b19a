"""Logs of a run that goes on: what was written stays, and what the checkpoint does not know of is put aside."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from tenzoo.atomic import atomic_write, unused


@dataclass(frozen=True)
class Resumed:
    """A run that goes on in its folder.

    Args:
        folder: Of the run.
        step: The first step that it will log; the one before may be logged in part.
    """

    folder: Path
    step: int


class ContinuedCSVLogger(CSVLogger):
    """Goes on with the ``metrics.csv`` of a run, which Lightning's would delete.

    Rows of steps that will be logged again move to ``metrics-1.csv``, with the first row that is written.
    """

    def __init__(self, resumed: Resumed) -> None:
        folder = resumed.folder
        super().__init__(folder.parents[1], name=folder.parent.name, version=folder.name)
        self._step = resumed.step

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _Continued(self.log_dir, self._step)
        return self._experiment  # type: ignore[return-value]


class _Continued(ExperimentWriter):
    def __init__(self, log_dir: str, step: int) -> None:
        super().__init__(log_dir)
        self._step = step
        self._begun = False
        self._path = Path(self.metrics_file_path)
        if self._path.is_file():
            with self._path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    @override
    def _check_log_dir_exists(self) -> None:
        """Leave its files there."""

    @override
    def log_hparams(self, params: dict[str, Any]) -> None:
        if not (Path(self.log_dir) / self.NAME_HPARAMS_FILE).exists():  # they are those of the run
            super().log_hparams(params)

    @override
    def save(self) -> None:
        if self.metrics and self._path.is_file():
            if not self._begun:
                self._begun = True
                self._take_out(lambda row: _step(row) >= self._step, kept_in=unused(self._path))
            again = [_columns(row) for row in self.metrics if _step(row) < self._step]
            if again:  # the step of the checkpoint was logged in part
                self._take_out(lambda row: _columns(row) in again and _step(row) == self._step - 1)
        super().save()

    def _take_out(self, wanted: Callable[[Mapping[str, str]], bool], *, kept_in: Path | None = None) -> None:
        with self._path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        out = [row for row in rows if wanted(row)]
        if not out:
            return
        if kept_in is not None:
            _write(kept_in, self.metrics_keys, out)
        _write(self._path, self.metrics_keys, [row for row in rows if not wanted(row)])


def _step(row: Mapping[str, Any]) -> float:
    return float(row["step"])


def _columns(row: Mapping[str, Any]) -> set[str]:
    """The columns of a row that have a value."""
    return {name for name, value in row.items() if value not in (None, "")}


def _write(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    with atomic_write(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
