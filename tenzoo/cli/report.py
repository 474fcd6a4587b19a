"""What a finished run prints."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table

from tenzoo.atomic import atomic_write
from tenzoo.callbacks import NormDynamicsMonitor
from tenzoo.messages import elided
from tenzoo.training import DivergenceError
from tenzoo.zoo.metrics import by_split

METRICS = "metrics.json"
"""In the folder of a run: the metrics of the weights that it ends with."""


def tell_of_early_stops(trainer: Trainer) -> None:
    """Say in a line why a run ended before its last epoch; Lightning itself says nothing of it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            reason = (callback.stopping_reason_message or "").removesuffix(" Signaling Trainer to stop.")
            rank_zero_info(f"stopped early, in epoch {callback.stopped_epoch}: {reason}")


def print_metrics(trainer: Trainer, logged: Mapping[str, Any], *, weights: str) -> None:
    """Print a row for each split and a column for each metric, from keys such as ``"held_out/r2"``.

    Args:
        trainer: Its log directory is named below the table. Only the first process prints.
        logged: By name.
        weights: Which weights were judged.

    Raises:
        DivergenceError: Afterwards, if a metric is not finite.
    """
    metrics = {key: float(value) for key, value in logged.items()}
    directory = trainer.log_dir
    if trainer.is_global_zero:
        if metrics:
            _print_table(metrics, weights)
        if directory is not None:
            drawn = any(isinstance(callback, NormDynamicsMonitor) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            print(f"Logs{', figure' if drawn else ''} and checkpoints: {directory}")
    wrong = {key: value for key, value in metrics.items() if not math.isfinite(value)}
    if wrong:
        key, value = next(iter(wrong.items()))
        raise DivergenceError(
            f"{key} is {value}, and no number to compare by: training diverged (lower the learning rate, or bound the "
            "gradient with model.init_args.gradient_clip_val), or the values of a split are all alike"
        )


def write_metrics(trainer: Trainer, logged: Mapping[str, Any], *, weights: str, checkpoint: str | None) -> None:
    """Write what :func:`print_metrics` prints to ``metrics.json`` in the log directory, if there is one.

    The file also has the name of the checkpoint that was judged, or null for the last weights, of the step it names.
    """
    directory = trainer.log_dir
    if directory is None or not trainer.is_global_zero or not Path(directory).is_dir():
        return
    content = {
        "weights": weights,
        "checkpoint": None if checkpoint is None else Path(checkpoint).name,
        "step": trainer.global_step,
        "metrics": {key: float(value) for key, value in logged.items()},
    }
    with atomic_write(Path(directory) / METRICS) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def log_final_metrics(trainer: Trainer, logged: Mapping[str, Any]) -> None:
    """Give TensorBoard the metrics that a run ends with beside its hyperparameters, as ``final/…``.

    They are those of the judged weights, and so no points of the curves, which have names without ``final``.
    """
    metrics = {f"final/{key}": float(value) for key, value in logged.items()}
    for logger in trainer.loggers:
        if metrics and isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.log_hyperparams(dict(logger.hparams), metrics, trainer.global_step)
            logger.finalize("success")


def _print_table(metrics: Mapping[str, float], weights: str) -> None:
    names, splits = by_split(metrics)
    headings = ["split", *({"r2": "R²", "rmse": "RMSE"}.get(name, name) for name in names)]
    rows = [[split, *(_text(value) for value in values)] for split, values in splits.items()]
    console = Console()
    if sum(max(map(len, column)) + 3 for column in zip(headings, *rows, strict=True)) >= console.width:
        headings, *rows = ([*column] for column in zip(headings, *rows, strict=True))  # a row for each metric
        headings[0] = "metric"
    name = console.width - sum(max(map(len, column)) + 3 for column in [*zip(headings, *rows, strict=True)][1:]) - 4
    table = Table()
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for first, *cells in rows:
        table.add_row(elided(first, name), *cells)
    console.print(f"Metrics of {weights}", style="italic", highlight=False, soft_wrap=True)
    console.print(table)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"
