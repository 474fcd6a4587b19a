"""What a task refuses before training: arguments, callbacks, optimizers and hooks that could not do their part."""

from collections.abc import Callable, Collection

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner.lr_finder import _LRCallback
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.parsing import lightning_hasattr
from torch.optim import LBFGS
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tenzoo.cores import find_core_groups
from tenzoo.training import scales_loss, unscales_its_gradients

_BETTER = {"r2": "max", "accuracy": "max", "loss": "min", "loss_epoch": "min", "rmse": "min"}
"""Whether the highest or the lowest value of a task's metric is the best, by the last part of its name."""


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


def check_arguments(task: LightningModule, trainer: Trainer) -> None:
    """Refuse Trainer arguments that the task has itself.

    Raises:
        ValueError: Naming the argument, and where it goes.
    """
    for name, unset in (("gradient_clip_val", None), ("accumulate_grad_batches", 1)):
        value = getattr(trainer, name)
        if value != unset:
            raise ValueError(
                f"expected `{name}` as an argument of the task, got {value} on the Trainer; "
                f"write model.init_args.{name}: {value} (in Python, {type(task).__name__}({name}={value}))"
            )


def check_modes(trainer: Trainer, *, known: Collection[str], watched_by_scheduler: str | None) -> None:
    """Refuse to keep the worst weights for the best: what takes the lower of two metrics of which the higher is better.

    Args:
        trainer: With its callbacks and schedulers.
        known: Names of metrics that are the task's own, whose direction is known by their last part.
        watched_by_scheduler: What a ``ReduceLROnPlateau`` of the task watches.

    Raises:
        ValueError: Naming the callback or scheduler, the metric and the mode.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    chosen = [(each, each.monitor) for each in callbacks if isinstance(each, ModelCheckpoint | EarlyStopping)]
    plateaus = [
        (config.scheduler, config.monitor or watched_by_scheduler)
        for config in trainer.lr_scheduler_configs
        if isinstance(config.scheduler, ReduceLROnPlateau)
    ]
    for each, name in [*chosen, *plateaus]:
        better = _BETTER.get(name.rpartition("/")[2]) if name is not None and name in known else None
        if better is not None and each.mode != better:
            order = {"max": "higher", "min": "lower"}[better]
            raise ValueError(
                f"expected 'mode' {better!r} of {type(each).__name__} for {name!r}, which is better the {order} it is, "
                f"got {each.mode!r}; add mode: {better}"
            )


def check_plateaus(trainer: Trainer, *, known: Collection[str]) -> None:
    """Refuse schedulers that would look for a metric of validation before there is one.

    Args:
        trainer: With its schedulers.
        known: Names of metrics that are the task's own.

    Raises:
        ValueError: Naming the metric, and what is in the way.
    """
    every = trainer.check_val_every_n_epoch
    for config in trainer.lr_scheduler_configs:
        name = config.monitor
        judged = (
            isinstance(config.scheduler, ReduceLROnPlateau) and name in known and not str(name).startswith("train/")
        )
        reason = None
        if judged and not trainer.enable_validation:
            reason = "without validation"
        elif judged and config.interval == "step":
            reason = "after each step, before the first validation"
        elif judged and every is not None and config.frequency % every:
            reason = f"in each epoch, where validation is in every {every}th (check_val_every_n_epoch)"
        if reason:
            raise ValueError(
                f"expected a metric that is logged in training for a ReduceLROnPlateau that asks {reason}, got {name!r}"
            )


def check_clipping(trainer: Trainer) -> None:
    """Refuse optimizers whose gradients cannot be clipped.

    Raises:
        ValueError: Naming the optimizer.
    """
    for optimizer in trainer.optimizers if scales_loss(trainer) else []:
        if unscales_its_gradients(optimizer):
            raise ValueError(
                "expected an optimizer without fused=True beside `gradient_clip_val` in 16-mixed precision, "
                f"got a fused {type(optimizer).__name__}, whose gradients are unscaled too late to be clipped"
            )


def check_sam(task: LightningModule, trainer: Trainer, *, only_cores: bool) -> None:
    """Refuse what SAM's two passes and its one step cannot do.

    Args:
        task: Built, with its hooks.
        trainer: With its optimizers.
        only_cores: Whether the cores alone are perturbed.

    Raises:
        ValueError: Naming what is in the way, and what to do in its place.
    """
    optimizers = trainer.optimizers
    if len(optimizers) != 1:
        raise ValueError(f"expected one optimizer beside `sam`, got {len(optimizers)}")
    if isinstance(optimizers[0], LBFGS):
        raise ValueError("expected a first-order optimizer beside `sam`, got LBFGS, which re-evaluates its closure")
    if any(group.get("maximize") for group in optimizers[0].param_groups):
        raise ValueError(
            "expected an optimizer that minimizes beside `sam`, which climbs the loss before, got one with "
            "maximize=True; let loss() return the negative"
        )
    for name, parameter in task.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"expected float32 or float64 weights beside `sam`, got {parameter.dtype} in {name!r}, where most "
                "perturbations round to none; train with precision 'bf16-mixed' or '16-mixed' in place of a true half "
                "one"
            )
    for hook in ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping"):
        if is_overridden(hook, task, parent=LightningModule):
            raise ValueError(
                f"expected no {hook}() in {type(task).__name__} beside `sam`, which steps by itself and would not "
                "call it; write on_before_optimizer_step() in its place"
            )
    if only_cores and not find_core_groups(task):
        raise ValueError(f"expected core groups in {type(task).__name__} for `sam.scope` 'cores', found none")
