"""The base of every task: one loss, trained in Lightning's automatic mode or, with SAM, in manual mode."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from tenzoo.cores import CoreContainer
from tenzoo.distributed import check_reduced, check_two_passes, share_buffers_
from tenzoo.dynamics import SharpnessState, SharpnessWindow
from tenzoo.jobs import secure
from tenzoo.snapshot import Kinds
from tenzoo.state_dicts import shape_differences, with_current_names
from tenzoo.tasks.averaging import keep_integers
from tenzoo.tasks.checks import check_arguments, check_callbacks, check_sam
from tenzoo.tasks.command_line import CommandLineMethods
from tenzoo.tasks.hooks import (
    ParentCall,
    add_callbacks,
    call_after,
    call_parent_hooks,
    complete_window,
    record_monitors,
    refuse_with_sam,
)
from tenzoo.tasks.hyperparameters import note_arguments, noted_arguments, only_plain
from tenzoo.tasks.optimized import OptimizedModule
from tenzoo.tasks.pretrained import PretrainedMethods
from tenzoo.tasks.quiet import QuietCheckpoints
from tenzoo.tasks.sam import SAM
from tenzoo.tasks.sam_step import sam_step
from tenzoo.tasks.schedulers import Schedule
from tenzoo.training import check_finite


class Task(OptimizedModule, CoreContainer, PretrainedMethods, CommandLineMethods):
    """A LightningModule whose subclasses write :meth:`loss`, and which trains it with or without SAM.

    Without ``sam`` Lightning optimizes automatically. With it the task optimizes manually: a backward pass to find the
    ascent direction, a second one at the perturbed weights, and one optimizer step at the restored weights.
    Accumulation, clipping, schedulers, precision, logging, ``max_steps`` and checkpoints act alike in both modes. Only
    the first pass changes normalization statistics, random numbers, metrics and attributes, and only the first pass
    logs. A ``loss`` that changes objects of a user's own classes should read :attr:`perturbed`.

    Subclasses may write hooks as for any LightningModule, with or without ``super()``: the task's own part of a hook
    runs in any case. With SAM, an own ``training_step`` has to call this one.

    Args:
        optimizer: Takes the trainable parameters, returns an optimizer. In YAML a ``class_path`` with ``init_args``.
        lr_scheduler: Takes the optimizer, returns a scheduler of ``torch.optim.lr_scheduler``; or a schedule over all
            optimizer steps of the run: ``"cosine"``, from the optimizer's learning rate down to 0, or ``"one_cycle"``,
            torch's ``OneCycleLR`` with that rate as the highest.
        lr_scheduler_interval: Step the scheduler after every ``"epoch"`` or optimizer ``"step"``. A schedule over the
            run always follows the steps.
        lr_scheduler_monitor: The logged metric that a ``ReduceLROnPlateau`` watches.
        sam: Train with SAM.
        gradient_clip_val: Bound on the gradients. It replaces the Trainer's argument of that name.
        gradient_clip_algorithm: Bound the ``"norm"`` over all parameters, or each ``"value"``.
        accumulate_grad_batches: Batches per optimizer step. It replaces the Trainer's argument of that name. SAM
            perturbs for each batch.

    Raises:
        ValueError: For a value out of its range; from ``fit``, before training starts, also for a Trainer, strategy or
            optimizer that does not fit these arguments.
    """

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
        super().__init__(
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_scheduler_interval=lr_scheduler_interval,
            lr_scheduler_monitor=lr_scheduler_monitor,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            accumulate_grad_batches=accumulate_grad_batches,
        )
        self.sam = SAM(**sam) if isinstance(sam, Mapping) else sam
        self.automatic_optimization = sam is None
        self.sharpness_state: SharpnessState | None = None
        """Gradient norms of SAM's ascents, over the batches since the last step; None without SAM."""
        self._ascents = SharpnessWindow()
        self._kinds = Kinds()
        self._perturbed = False
        self._perturbed_was_read = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        note_arguments(cls)
        call_parent_hooks(cls, Task, _PARENT_HOOKS)

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

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch: the loss in automatic mode, the whole step of SAM in manual mode."""
        if self.sam is None or self.trainer.fit_loop._skip_backward:  # a callback asks for the forward pass alone
            loss = self.loss(batch, batch_idx)
            self._note_loss(loss, batch)
            return loss
        # Lightning calls this in its autocast context. A backward pass does not belong there: the reconstruction of
        # weights from their cores would run in half precision.
        with torch.autocast(self.device.type, enabled=False):
            return sam_step(self, self.sam, batch, batch_idx)

    @property
    def perturbed(self) -> bool:
        """Whether :meth:`loss` is called at SAM's perturbed weights.

        If the first pass reads this, attributes are kept as both passes leave them. Otherwise the changes of the second
        pass are undone.
        """
        self._perturbed_was_read = True
        return self._perturbed

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as LightningModule does. At SAM's perturbed weights nothing is logged.

        With several processes, a metric that is monitored or logged over an epoch of validation or test is reduced over
        them, as with ``sync_dist=True``.
        """
        if not self._perturbed:
            super().log(name, value, *args, **kwargs)

    # --- hooks -------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Add the callbacks of safe runs, and refuse Trainer arguments that belong to the task.

        This is the first hook with a trainer. It runs before Lightning's own check, which suggests nothing to do.
        """
        check_arguments(self, self.trainer)
        accumulates = self.accumulate_grad_batches > 1
        check_callbacks(self, self.trainer, sam=self.sam is not None, accumulates=accumulates)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        quiet = self.sam is None or any(isinstance(each, QuietCheckpoints) for each in callbacks)
        return [*secure(self.trainer), *([] if quiet else [QuietCheckpoints()])]

    def setup(self, stage: str) -> None:
        """Refuse strategies that cannot make SAM's two passes, and hand the accumulation to Lightning."""
        super().setup(stage)
        if stage == "fit" and self.sam is not None:
            check_two_passes(self.trainer.strategy, sync_ascent=self.sam.sync_ascent)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, before anything is loaded, and load the means of its epoch.

        A strategy that shards parameters has loaded the weights already.
        """
        if "state_dict" in checkpoint:
            own = self.state_dict()
            checkpoint["state_dict"] = with_current_names(checkpoint["state_dict"], own)
            for name, mine, other in shape_differences(own, checkpoint["state_dict"]) if self.strict_loading else ():
                raise ValueError(
                    f"expected a checkpoint of this model in `ckpt_path`, got one with {name!r} of shape {other} where "
                    f"the model has {mine}"
                )
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            for name, mean in self._epoch_means.items():
                mean.load(checkpoint.get("epoch_means", {}).get(name), self._trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to replace a good checkpoint by weights that are not finite, and add the means of the epoch.

        Raises:
            DivergenceError: With the name of a parameter.
        """
        if self._trainer is None:  # the user saves, outside of a run
            check_finite(self, when="before a run, and was not saved")
            return
        check_finite(self, when=f"after {self.trainer.global_step} steps, and was not saved", losses=self._losses)
        checkpoint["epoch_means"] = {name: mean.state(self.trainer) for name, mean in self._epoch_means.items()}

    def on_fit_start(self) -> None:
        """Refuse, before the first step, settings that SAM, clipping, the strategy or the metrics do not allow."""
        if self.sam is not None:
            self._restore_monitors()
        super().on_fit_start()
        check_reduced(self.trainer.strategy, self)
        keep_integers(self.trainer)
        if self.sam is not None:
            check_sam(self, self.trainer, only_cores=self.sam.scope == "cores")
            share_buffers_(self.trainer)


_PARENT_HOOKS: Mapping[str, ParentCall] = {
    "setup": call_after,
    "teardown": call_after,
    "configure_callbacks": add_callbacks,
    "configure_optimizers": record_monitors,
    "on_load_checkpoint": call_after,
    "on_save_checkpoint": call_after,
    "on_fit_start": call_after,
    "on_train_start": call_after,
    "on_train_end": call_after,
    "on_train_epoch_start": call_after,
    "on_train_batch_start": call_after,
    "training_step": refuse_with_sam,
    "backward": complete_window,
    "on_before_optimizer_step": call_after,
    "on_train_batch_end": call_after,
    "on_train_epoch_end": call_after,
    "on_validation_epoch_start": call_after,
    "on_validation_epoch_end": call_after,
    "on_test_epoch_start": call_after,
    "on_test_epoch_end": call_after,
}
"""How the hooks of a task are called, if the hooks of a subclass do not call ``super()``."""

call_parent_hooks(Task, Task, _PARENT_HOOKS)
