"""Callbacks of Lightning that mean something else, or nothing, beside a task: refused before anything is built."""

from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner.lr_finder import _LRCallback
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.parsing import lightning_hasattr


def check_callbacks(task: LightningModule, trainer: Trainer, *, sam: bool, accumulates: bool) -> None:
    """Refuse callbacks that could not do what they are for.

    Args:
        task: Not set up yet.
        trainer: With its callbacks.
        sam: Whether the task trains with SAM, in manual mode.
        accumulates: Whether the task accumulates gradients by itself.

    Raises:
        ValueError: Naming the callback, and what to do in its place.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for kind, check in _CHECKS.items():
            if isinstance(callback, kind):
                check(callback, task, trainer)
        if isinstance(callback, GradientAccumulationScheduler) and sam:
            raise ValueError(
                "expected no GradientAccumulationScheduler beside `sam`, got one: it acts in automatic optimization "
                "only; set `accumulate_grad_batches` of the task"
            )
        if isinstance(callback, GradientAccumulationScheduler) and accumulates:
            raise ValueError(
                "expected no GradientAccumulationScheduler beside `accumulate_grad_batches` of the task, got both; "
                "leave one out"
            )


def searches_learning_rate(trainer: Trainer) -> bool:
    """Whether the current steps belong to a range test of the learning rate, which ends where training diverges."""
    return any(isinstance(callback, _LRCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _check_built(callback: Callback, task: LightningModule, trainer: Trainer) -> None:
    late = is_overridden("configure_model", task, parent=LightningModule)
    if late and next(task.parameters(), None) is None:
        raise ValueError(
            f"expected a model that is built before training for {type(callback).__name__}, which reads it in `setup`, "
            f"got {type(task).__name__} that builds it later; name what it takes from the data, such as `shape`"
        )


def _check_rate(callback: Callback, task: LightningModule, trainer: Trainer) -> None:
    assert isinstance(callback, LearningRateFinder)
    names = [callback._attr_name] if callback._attr_name else ["lr", "learning_rate"]
    if callback._update_attr and not any(lightning_hasattr(task, name) for name in names):
        raise ValueError(
            "expected no LearningRateFinder that sets the rate beside a task whose optimizer has it, got one; run it "
            "with update_attr=False in Python, Tuner(trainer).lr_find(task, ...), and set the rate of the `optimizer`"
        )


def _check_batch_size(callback: Callback, task: LightningModule, trainer: Trainer) -> None:
    assert isinstance(callback, BatchSizeFinder)
    data = getattr(trainer, "datamodule", None)
    if getattr(data, callback._batch_arg_name, 1) is None:
        raise ValueError(
            f"expected an int in `{callback._batch_arg_name}` of the data for BatchSizeFinder, got null, which takes "
            "all; give a number to start from"
        )


_CHECKS: dict[type[Callback], Callable[[Callback, LightningModule, Trainer], None]] = {
    StochasticWeightAveraging: _check_built,
    ModelPruning: _check_built,
    BaseFinetuning: _check_built,
    LearningRateFinder: _check_rate,
    BatchSizeFinder: _check_batch_size,
}
