"""What a task refuses before training: arguments, callbacks, optimizers and hooks that would not work."""

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
from tenzoo.dynamics import is_distributed
from tenzoo.training import scales_loss, unscales_its_gradients

_BETTER = {
    **dict.fromkeys(("r2", "accuracy", "f1", "matthews", "pearson", "spearman"), "max"),
    "loss": "min",
    "loss_epoch": "min",
    "rmse": "min",
}
"""Whether a metric is best at its highest or lowest value, by the last part of its name."""


def check_callbacks(task: LightningModule, trainer: Trainer, *, sam: bool, accumulates: bool) -> None:
    """Refuse callbacks that would not work.

    Args:
        task: The task, not set up yet.
        trainer: The Trainer, with its callbacks.
        sam: Whether the task trains with SAM, in manual mode.
        accumulates: Whether the task accumulates gradients.

    Raises:
        ValueError: With the callback, and what to do instead.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for kind, check in _CHECKS.items():
            if isinstance(callback, kind):
                check(callback, task, trainer)
        if isinstance(callback, GradientAccumulationScheduler) and sam:
            raise ValueError(
                "expected no GradientAccumulationScheduler with `sam`, got one: it acts in automatic optimization "
                "only; set `accumulate_grad_batches` of the task"
            )
        if isinstance(callback, GradientAccumulationScheduler) and accumulates:
            raise ValueError(
                "expected no GradientAccumulationScheduler with `accumulate_grad_batches` of the task, got both"
            )


def searches_learning_rate(trainer: Trainer) -> bool:
    """Whether the current steps belong to a search for the learning rate, which ends when training diverges."""
    return any(isinstance(callback, _LRCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _check_model_is_built(callback: Callback, task: LightningModule, trainer: Trainer) -> None:
    late = is_overridden("configure_model", task, parent=LightningModule)
    if late and next(task.parameters(), None) is None:
        raise ValueError(
            f"expected a model that is built before training for {type(callback).__name__}, got {type(task).__name__}, "
            "which builds it later; give the arguments that it takes from the data, such as `shape`"
        )


def _check_learning_rate_finder(callback: Callback, task: LightningModule, trainer: Trainer) -> None:
    assert isinstance(callback, LearningRateFinder)
    names = [callback._attr_name] if callback._attr_name else ["lr", "learning_rate"]
    if callback._update_attr and not any(lightning_hasattr(task, name) for name in names):
        raise ValueError(
            "expected no LearningRateFinder that sets the rate with a task whose optimizer has it, got one; call "
            "Tuner(trainer).lr_find(task, update_attr=False) in Python, and set the rate of the `optimizer`"
        )


def _check_batch_size_finder(callback: Callback, task: LightningModule, trainer: Trainer) -> None:
    assert isinstance(callback, BatchSizeFinder)
    data = getattr(trainer, "datamodule", None)
    if getattr(data, callback._batch_arg_name, 1) is None:
        raise ValueError(
            f"expected an int in `{callback._batch_arg_name}` of the data for BatchSizeFinder, got null, which is one "
            "batch of all; give a number to start from"
        )


_CHECKS: dict[type[Callback], Callable[[Callback, LightningModule, Trainer], None]] = {
    StochasticWeightAveraging: _check_model_is_built,
    ModelPruning: _check_model_is_built,
    BaseFinetuning: _check_model_is_built,
    LearningRateFinder: _check_learning_rate_finder,
    BatchSizeFinder: _check_batch_size_finder,
}


def check_arguments(task: LightningModule, trainer: Trainer) -> None:
    """Refuse Trainer arguments that belong to the task.

    Raises:
        ValueError: With the argument, and where to give it.
    """
    for name, unset in (("gradient_clip_val", None), ("accumulate_grad_batches", 1)):
        value = getattr(trainer, name)
        if value != unset:
            raise ValueError(
                f"expected `{name}` as an argument of the task, got {value} on the Trainer; "
                f"write model.init_args.{name}: {value} (in Python, {type(task).__name__}({name}={value}))"
            )


def check_modes(trainer: Trainer, *, known: Collection[str], watched_by_scheduler: str | None) -> None:
    """Refuse callbacks and schedulers that take the worst value of a metric for the best.

    Args:
        trainer: The Trainer, with its callbacks and schedulers.
        known: Names of the task's own metrics. The last part of a name tells which values are better.
        watched_by_scheduler: The metric that a ``ReduceLROnPlateau`` of the task watches.

    Raises:
        ValueError: With the callback or scheduler, the metric and the mode.
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
                f"expected 'mode' {better!r} of {type(each).__name__} for {name!r}, which is better if it is {order}, "
                f"got {each.mode!r}; add mode: {better}"
            )


def check_plateaus(trainer: Trainer, *, known: Collection[str]) -> None:
    """Refuse schedulers that need a metric of validation before the first validation.

    Args:
        trainer: The Trainer, with its schedulers.
        known: Names of the task's own metrics.

    Raises:
        ValueError: With the metric, and why it is not there in time.
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
            reason = f"in each epoch, with a validation in every {every}th (check_val_every_n_epoch)"
        if reason:
            raise ValueError(
                f"expected a metric that is logged in training for a ReduceLROnPlateau that asks {reason}, got {name!r}"
            )


def check_clipping(trainer: Trainer) -> None:
    """Refuse optimizers whose gradients cannot be clipped, and gradients of which only some are sharded.

    Raises:
        ValueError: With the optimizer, or the way to shard.
    """
    for optimizer in trainer.optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if len({is_distributed(parameter) for parameter in parameters}) > 1:
            raise ValueError(
                "expected parameters that are all sharded, or all whole, with `gradient_clip_val`, got both in one "
                f"{type(optimizer).__name__}; shard all of them, or only what is frozen"
            )
    for optimizer in trainer.optimizers if scales_loss(trainer) else []:
        if unscales_its_gradients(optimizer):
            raise ValueError(
                "expected an optimizer without fused=True with `gradient_clip_val` in 16-mixed precision, "
                f"got a fused {type(optimizer).__name__}, whose gradients are unscaled too late to be clipped"
            )


def check_sam(task: LightningModule, trainer: Trainer, *, only_cores: bool) -> None:
    """Refuse optimizers, weights and hooks with which SAM cannot train.

    Args:
        task: The task, with its model.
        trainer: The Trainer, with its optimizers.
        only_cores: Whether only cores are perturbed.

    Raises:
        ValueError: With the obstacle, and what to do instead.
    """
    optimizers = trainer.optimizers
    if len(optimizers) != 1:
        raise ValueError(f"expected one optimizer with `sam`, got {len(optimizers)}")
    if isinstance(optimizers[0], LBFGS):
        raise ValueError("expected a first-order optimizer with `sam`, got LBFGS, which re-evaluates its closure")
    if any(group.get("maximize") for group in optimizers[0].param_groups):
        raise ValueError(
            "expected an optimizer that minimizes with `sam`, got one with maximize=True; let loss() return the "
            "negative"
        )
    for name, parameter in task.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"expected float32 or float64 weights with `sam`, got {parameter.dtype} in {name!r}, which rounds most "
                "perturbations to zero; train with precision 'bf16-mixed' or '16-mixed'"
            )
    for hook in ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping"):
        if is_overridden(hook, task, parent=LightningModule):
            raise ValueError(
                f"expected no {hook}() in {type(task).__name__} with `sam`, which does not call it; write "
                "on_before_optimizer_step()"
            )
    if only_cores and not find_core_groups(task):
        raise ValueError(f"expected core groups in {type(task).__name__} for `sam.scope` 'cores', found none")
