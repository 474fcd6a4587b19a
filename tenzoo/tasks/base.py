"""The base of every task: one loss, trained in Lightning's automatic mode or, with SAM, in manual mode."""

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MetricCollection

from tenzoo.cores import CoreGroup, CoreProvider, find_core_groups
from tenzoo.distributed import check_two_passes, share_buffers_
from tenzoo.dynamics import SharpnessState, SharpnessWindow
from tenzoo.jobs import secure
from tenzoo.tasks.averaging import keep_integers
from tenzoo.tasks.checks import (
    check_arguments,
    check_callbacks,
    check_clipping,
    check_modes,
    check_plateaus,
    check_sam,
    searches_learning_rate,
)
from tenzoo.tasks.command_line import CommandLineMethods
from tenzoo.tasks.hooks import (
    Otherwise,
    all_callbacks,
    do_after,
    keep_duties,
    monitors_noted,
    refuse_beside_sam,
    window_completed,
)
from tenzoo.tasks.hyperparameters import note_arguments, noted_arguments, only_plain
from tenzoo.tasks.ranks import as_of_all_ranks, logged_names, warn_of_repeats
from tenzoo.tasks.sam import SAM
from tenzoo.tasks.sam_step import sam_step
from tenzoo.tasks.schedulers import Schedule, check_periods, check_schedule, schedule_over_run, step_schedulers
from tenzoo.training import (
    EpochMean,
    batch_items,
    batches_in_window,
    check_finite,
    logs_this_step,
    mean_over_ranks,
    steps_after_this_batch,
)


class Task(LightningModule, CoreProvider, CommandLineMethods):
    """A LightningModule whose subclasses write :meth:`loss`, and which trains it with or without SAM.

    Without ``sam`` Lightning optimizes automatically. With it the task optimizes manually: a backward pass to find the
    ascent direction, a second one at the perturbed weights, one optimizer step at the restored ones. Accumulation,
    clipping, schedulers, precision, logging, ``max_steps`` and checkpoints act alike in both modes. Normalization
    statistics, random numbers, metrics, attributes and whatever ``loss`` logs see the first pass only; a ``loss`` that
    changes objects of classes of its own should ask :attr:`perturbed`.

    Subclasses may write hooks as for any LightningModule, with ``super()`` or without: what a task does in a hook is
    done after it in any case. With SAM a ``training_step`` of one's own has to call this one.

    Args:
        optimizer: Takes the trainable parameters, returns an optimizer. In YAML a ``class_path`` with ``init_args``.
        lr_scheduler: Takes the optimizer, returns a scheduler of ``torch.optim.lr_scheduler``; or a schedule over all
            optimizer steps of the run: ``"cosine"``, from the optimizer's learning rate down to 0, or ``"one_cycle"``,
            torch's ``OneCycleLR`` with that rate as the highest.
        lr_scheduler_interval: Step the scheduler after every ``"epoch"`` or optimizer ``"step"``. A schedule over the
            run has its own: it always follows the steps.
        lr_scheduler_monitor: The logged metric that a ``ReduceLROnPlateau`` watches.
        sam: Switches SAM on.
        gradient_clip_val: Bound on the gradients, in place of the Trainer's argument of that name.
        gradient_clip_algorithm: Bound the ``"norm"`` over all parameters, or each ``"value"``.
        accumulate_grad_batches: Batches per optimizer step, in place of the Trainer's argument of that name. SAM
            perturbs for each batch.

    Raises:
        ValueError: For a value out of its range; from ``fit`` also for a Trainer, strategy or optimizer that does not
            go with these arguments, before training starts.
    """

    _leaves_out_repeats: ClassVar[bool] = False
    """Whether the metrics count an item once that a DistributedSampler gives to two processes."""

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: Schedule | LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        lr_scheduler_monitor: str | None = None,
        sam: SAM | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate_grad_batches: int = 1,
    ) -> None:
        super().__init__()
        sam = SAM(**sam) if isinstance(sam, Mapping) else sam
        if lr_scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"expected 'epoch' or 'step' in `lr_scheduler_interval`, got {lr_scheduler_interval!r}")
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise ValueError(f"expected a positive number or null in `gradient_clip_val`, got {gradient_clip_val}")
        if gradient_clip_algorithm not in ("norm", "value"):
            raise ValueError(
                f"expected 'norm' or 'value' in `gradient_clip_algorithm`, got {gradient_clip_algorithm!r}"
            )
        if gradient_clip_algorithm != "norm" and gradient_clip_val is None:
            raise ValueError(
                f"expected `gradient_clip_val` beside `gradient_clip_algorithm` {gradient_clip_algorithm!r}, got none"
            )
        if isinstance(accumulate_grad_batches, bool) or accumulate_grad_batches < 1:
            raise ValueError(f"expected an int >= 1 in `accumulate_grad_batches`, got {accumulate_grad_batches}")
        if not callable(optimizer):
            raise TypeError(f"expected a class or function that makes an optimizer in `optimizer`, got {optimizer!r}")
        if isinstance(lr_scheduler, str):
            check_schedule(lr_scheduler)
        self._optimizer_of = optimizer
        self._scheduler_of = lr_scheduler
        self._scheduler_interval = "step" if isinstance(lr_scheduler, str) else lr_scheduler_interval
        self._scheduler_monitor = lr_scheduler_monitor
        self.sam = sam
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.accumulate_grad_batches = accumulate_grad_batches
        self.automatic_optimization = sam is None
        self.sharpness_state: SharpnessState | None = None
        """What the ascents of SAM knew, of the batches since the last step; None without SAM."""
        self._ascents = SharpnessWindow()
        self._monitors: dict[int, str | None] = {}
        self._perturbed = False
        self._asked = False
        self._epoch_means = {"train/loss": EpochMean()}
        self._loss_is_watched = False
        self._monitored: frozenset[str] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        note_arguments(cls)
        keep_duties(cls, Task, _DUTIES)

    def save_hyperparameters(
        self, *args: Any, ignore: str | Sequence[str] | None = None, frame: Any = None, logger: bool = True
    ) -> None:
        """Save the arguments of the constructors, of the class and its base classes, that are builtins.

        An optimizer, a scheduler or a network given as an object is left out: a checkpoint that loads with
        ``weights_only=True`` holds no code. From the command line all are builtins, and kept.

        Args:
            *args: Names of the arguments to save, all by default; or one mapping or namespace of other values.
            ignore: Names of arguments that are left out.
            frame: Is not used: the constructors note their arguments.
            logger: Whether loggers are given them.
        """
        names = [name for name in args if isinstance(name, str)]
        if len(names) < len(args):
            super().save_hyperparameters(*args, logger=logger)
            values = dict(self.hparams)
            self.hparams.clear()
        else:
            from_command_line = _given_hyperparameters.get()
            noted = noted_arguments(self) if from_command_line is None else from_command_line
            values = {name: noted[name] for name in names or noted if name in noted}
        super().save_hyperparameters(only_plain(values, ignore=ignore), ignore=ignore, logger=logger)

    @abstractmethod
    def loss(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of one training batch, a scalar."""

    def core_groups(self) -> list[CoreGroup]:
        """The groups of all submodules."""
        children = nn.Module()
        for name, child in self.named_children():
            children.add_module(name, child)
        return find_core_groups(children)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch: the loss in automatic mode, all of SAM's step in manual mode."""
        if self.sam is None or self.trainer.fit_loop._skip_backward:  # a callback wants the forward pass alone
            loss = self.loss(batch, batch_idx)
            self._note_loss(loss, batch)
            return loss
        # Lightning calls this inside of its context of the precision. A backward pass does not belong there: autocast
        # would run it in half precision where the weights are rebuilt from their cores.
        with torch.autocast(self.device.type, enabled=False):
            return sam_step(self, self.sam, batch, batch_idx)

    def _note_loss(self, loss: Tensor, batch: Any) -> None:
        """Log the loss of a batch, and add it to the mean over the items of the epoch."""
        loss, items = loss.detach(), batch_items(self, batch)
        self._epoch_means["train/loss"].add(loss * items, items)
        if self._loss_is_watched or logs_this_step(self.trainer):
            # On the host: Lightning's progress bar reads it again after every batch.
            value = mean_over_ranks(self.trainer, loss).cpu()
            self.log("train/loss", value, prog_bar=True, sync_dist=False)
            if not value.isfinite():  # an overflow in float16 is none of the weights'
                self._check_finite()

    def _check_finite(self) -> None:
        if not searches_learning_rate(self.trainer):
            check_finite(self, when=f"after {self.trainer.global_step} steps")

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagate; the last batch of a short accumulation window makes its gradient a mean over the window."""
        super().backward(loss, *args, **kwargs)
        if self.automatic_optimization:
            self._complete_window()

    def _complete_window(self) -> None:
        """Divide the gradient by the batches that it was accumulated over, where an epoch ends within a window.

        Each batch was divided by those of a whole window, before it was known that there would be fewer.
        """
        window, batches = self.trainer.accumulate_grad_batches, batches_in_window(self.trainer)
        if batches < window and steps_after_this_batch(self.trainer):
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(window / batches)

    def _step_schedulers(self, interval: str, *, plateau: bool) -> None:
        if not self.automatic_optimization:
            step_schedulers(self, interval=interval, plateau=plateau)

    @property
    def perturbed(self) -> bool:
        """Whether :meth:`loss` is being called at SAM's perturbed weights.

        A pass that asks decides itself what the second one does with its attributes; otherwise they are put back.
        """
        self._asked = True
        return self._perturbed

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as LightningModule does, except at SAM's perturbed weights: there nothing is logged.

        With several processes a metric that is monitored, or logged over an epoch of validation or test, is reduced
        over them, as with ``sync_dist=True``.
        """
        if self._perturbed:
            return
        if self._trainer is not None and self._trainer.world_size > 1:
            value = as_of_all_ranks(self, value, kwargs, monitored=name in self._monitored)
        super().log(name, value, *args, **kwargs)

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        """Log each value as :meth:`log` does; LightningModule's own would say of each that it is not to be reduced."""
        metrics = isinstance(dictionary, MetricCollection)
        items = dictionary.items(keep_base=False, copy_state=False) if metrics else dictionary.items()
        for name, value in items:
            self.log(name, value, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the running hook here, forty times a step. nn.Module would each time look for a parameter, a
        # submodule and a buffer of that name, which adds up to a fifteenth of a small model's step.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def metric_names(self) -> set[str] | None:
        """What is logged during training and validation, known before; None where it is not."""
        return None

    # --- hooks -------------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> Iterable[nn.Parameter] | Iterable[dict[str, Any]]:
        """The parameters that the optimizer is given, or groups of them with settings of their own."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def build_optimizer(self) -> Optimizer:
        """The optimizer over all trainable parameters."""
        return self._optimizer_of(self.trainable_parameters())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, and the scheduler if there is one."""
        optimizer = self.build_optimizer()
        if self._scheduler_of is None:
            if self._scheduler_interval != "epoch" or self._scheduler_monitor is not None:
                raise ValueError(
                    "expected `lr_scheduler` beside `lr_scheduler_interval` and `lr_scheduler_monitor`, got none for "
                    f"{self._scheduler_interval!r} and {self._scheduler_monitor!r}"
                )
            return optimizer
        if isinstance(self._scheduler_of, str):
            scheduler: Any = schedule_over_run(self._scheduler_of, optimizer, self.trainer)
        else:
            scheduler = self._scheduler_of(optimizer)
            check_periods(scheduler)
        if isinstance(scheduler, ReduceLROnPlateau) and self._scheduler_monitor is None:
            raise ValueError(
                "expected the name of a logged metric in `lr_scheduler_monitor` for ReduceLROnPlateau, got none"
            )
        settings = {"scheduler": scheduler, "interval": self._scheduler_interval}
        if not self.automatic_optimization:
            self._monitors[id(scheduler)] = self._scheduler_monitor
            return [optimizer], [settings]  # type: ignore[return-value]
        settings["monitor"] = self._scheduler_monitor
        return {"optimizer": optimizer, "lr_scheduler": settings}  # type: ignore[return-value]

    def configure_callbacks(self) -> list[Callback]:
        """Add what makes a run safe to stop and to resume, and refuse Trainer arguments that the task has itself.

        This hook is the first that runs with a trainer: before Lightning's own check, which knows no remedy.
        """
        check_arguments(self, self.trainer)
        accumulates = self.accumulate_grad_batches > 1
        check_callbacks(self, self.trainer, sam=self.sam is not None, accumulates=accumulates)
        return secure(self.trainer)

    def setup(self, stage: str) -> None:
        """Hand the accumulation to Lightning, which acts on it in automatic mode and counts steps by it in both."""
        if stage == "fit":
            self.trainer.accumulate_grad_batches = self.accumulate_grad_batches
            if self.sam is not None:
                check_two_passes(self.trainer.strategy, sync_ascent=self.sam.sync_ascent)

    def teardown(self, stage: str) -> None:
        """Give the Trainer back as it was."""
        if stage == "fit":
            self.trainer.accumulate_grad_batches = 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, before anything of it is taken over."""
        own = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        other = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        for name in [*own, *other] if self.strict_loading else []:
            if own.get(name) != other.get(name):
                raise ValueError(
                    f"expected a checkpoint of this model in `ckpt_path`, got one with {name!r} of shape "
                    f"{other.get(name)} where the model has {own.get(name)}"
                )
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            for name, mean in self._epoch_means.items():
                mean.load(checkpoint.get("epoch_means", {}).get(name), self._trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite over good ones, and add the means of the epoch so far.

        Raises:
            DivergenceError: Naming a parameter.
        """
        if self._trainer is None:  # saved by hand, outside of a run
            check_finite(self, when="before a run, and was not saved")
            return
        check_finite(self, when=f"after {self.trainer.global_step} steps, and was not saved")
        checkpoint["epoch_means"] = {name: mean.state(self.trainer) for name, mean in self._epoch_means.items()}

    def on_fit_start(self) -> None:
        """Refuse what SAM, or clipping, cannot do, and metrics that nobody logs, before the first step."""
        for config in self.trainer.lr_scheduler_configs if self.sam is not None else []:
            config.monitor = self._monitors.get(id(config.scheduler))
            if isinstance(config.scheduler, ReduceLROnPlateau) and config.monitor is None:
                raise ValueError("expected the name of a logged metric as `monitor` of ReduceLROnPlateau, got none")
        self._check_monitored()
        keep_integers(self.trainer)
        if self.sam is not None:
            check_sam(self, self.trainer, only_cores=self.sam.scope == "cores")
            share_buffers_(self.trainer)
            # A checkpoint holds the weights after the step, in manual as in automatic mode: no reason to warn.
            warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        if self.gradient_clip_val is not None:
            check_clipping(self.trainer)

    def _check_monitored(self) -> None:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        watched = [(f"`monitor` of {type(each).__name__}", getattr(each, "monitor", None)) for each in callbacks]
        watched.append(("`lr_scheduler_monitor`", self._scheduler_monitor))
        names = [name for _, name in watched]
        self._loss_is_watched = "train/loss" in names
        self._monitored = logged_names([*names, *(config.monitor for config in self.trainer.lr_scheduler_configs)])
        known = self.metric_names
        for where, name in watched:
            if known is not None and isinstance(name, str) and name not in known:
                raise ValueError(f"expected one of {sorted(known)} in {where}, got {name!r}, which nobody logs here")
        check_modes(self.trainer, known=known or (), watched_by_scheduler=self._scheduler_monitor)
        check_plateaus(self.trainer, known=known or ())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip, in both modes. Callbacks have run before: they see the gradients as they were."""
        if self.gradient_clip_val is None:
            return
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            # Nothing is unscaled here: the plugin's own method refuses fused optimizers for the sake of float16.
            algorithm = GradClipAlgorithmType(self.gradient_clip_algorithm)
            Precision.clip_gradients(plugin, optimizer, self.gradient_clip_val, algorithm)
        else:
            self.clip_gradients(
                optimizer,
                gradient_clip_val=self.gradient_clip_val,
                gradient_clip_algorithm=self.gradient_clip_algorithm,
            )

    def on_validation_epoch_start(self) -> None:
        """Warn of items that are judged by two processes."""
        if not self._leaves_out_repeats:
            warn_of_repeats(self.trainer.val_dataloaders)

    def on_test_epoch_start(self) -> None:
        """Warn of items that are judged by two processes."""
        if not self._leaves_out_repeats:
            warn_of_repeats(self.trainer.test_dataloaders)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """In manual mode, step plateau schedulers for the batch before, whose validation is over by now."""
        if batch_idx > 0 and batch_idx % self.accumulate_grad_batches == 0:
            self._step_schedulers("step", plateau=True)

    def on_train_epoch_start(self) -> None:
        """Begin the means over the epoch; in one of forward passes alone, forget the gradients of the one before.

        Stochastic weight averaging ends with such an epoch, and Lightning still steps the optimizer in it.
        """
        if self.trainer.fit_loop._skip_backward:
            self.zero_grad()
        for mean in self._epoch_means.values():
            mean.reset()

    def on_train_epoch_end(self) -> None:
        """Log the mean over the epoch; in manual mode, step plateau schedulers.

        Raises:
            DivergenceError: If a weight is not finite.
        """
        self._check_finite()
        loss = self._epoch_mean("train/loss")
        if loss is not None:
            self.log("train/loss_epoch", loss, sync_dist=True)
            self.log("train/loss", loss, sync_dist=True, logger=False)  # to be monitored; loggers have it by steps
        self._step_schedulers("step", plateau=True)
        self._step_schedulers("epoch", plateau=True)

    def _epoch_mean(self, name: str) -> Tensor | None:
        """The mean over the epoch that ends, None without a batch; it is begun anew."""
        mean = self._epoch_means[name].compute(self.trainer)
        self._epoch_means[name].reset()
        return mean


_DUTIES: Mapping[str, Otherwise] = {
    "setup": do_after,
    "teardown": do_after,
    "configure_callbacks": all_callbacks,
    "configure_optimizers": monitors_noted,
    "on_load_checkpoint": do_after,
    "on_save_checkpoint": do_after,
    "on_fit_start": do_after,
    "on_train_epoch_start": do_after,
    "on_train_batch_start": do_after,
    "training_step": refuse_beside_sam,
    "backward": window_completed,
    "on_before_optimizer_step": do_after,
    "on_train_batch_end": do_after,
    "on_train_epoch_end": do_after,
    "on_validation_epoch_start": do_after,
    "on_validation_epoch_end": do_after,
    "on_test_epoch_start": do_after,
    "on_test_epoch_end": do_after,
}
"""What a task does in hooks, where a subclass has one of its own that does not call ``super()``."""

keep_duties(Task, Task, _DUTIES)
