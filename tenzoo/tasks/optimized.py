"""How a task optimizes: optimizer, scheduler, clipping and accumulation, alike in automatic and manual mode."""

from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tenzoo.tasks.checks import check_clipping
from tenzoo.tasks.logged import LoggedModule
from tenzoo.tasks.schedulers import Schedule, check_periods, check_schedule, schedule_over_run, step_schedulers
from tenzoo.training import batches_in_window, steps_after_this_batch


class OptimizedModule(LoggedModule):
    """A LightningModule with the optimizer as an argument. :class:`~tenzoo.tasks.Task` describes the arguments."""

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: Schedule | LRSchedulerCallable | None,
        lr_scheduler_interval: Literal["epoch", "step"],
        lr_scheduler_monitor: str | None,
        gradient_clip_val: float | None,
        gradient_clip_algorithm: Literal["norm", "value"],
        accumulate_grad_batches: int,
    ) -> None:
        super().__init__()
        if not callable(optimizer):
            raise TypeError(f"expected a class or function that makes an optimizer in `optimizer`, got {optimizer!r}")
        if lr_scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"expected 'epoch' or 'step' in `lr_scheduler_interval`, got {lr_scheduler_interval!r}")
        if isinstance(lr_scheduler, str):
            check_schedule(lr_scheduler)
        _check_gradient_arguments(gradient_clip_val, gradient_clip_algorithm, accumulate_grad_batches)
        self._optimizer_of = optimizer
        self._scheduler_of = lr_scheduler
        self._scheduler_interval = "step" if isinstance(lr_scheduler, str) else lr_scheduler_interval
        self._scheduler_monitor = lr_scheduler_monitor
        self._monitors: dict[int, str | None] = {}
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.accumulate_grad_batches = accumulate_grad_batches

    def trainable_parameters(self) -> Iterable[nn.Parameter] | Iterable[dict[str, Any]]:
        """The parameters for the optimizer, or groups of them with settings of their own."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def build_optimizer(self) -> Optimizer:
        """The optimizer over all trainable parameters."""
        return self._optimizer_of(self.trainable_parameters())

    def _build_scheduler(self, optimizer: Optimizer) -> Any:
        if isinstance(self._scheduler_of, str):
            scheduler: Any = schedule_over_run(self._scheduler_of, optimizer, self.trainer)
        else:
            assert self._scheduler_of is not None
            scheduler = self._scheduler_of(optimizer)
            check_periods(scheduler)
        if isinstance(scheduler, ReduceLROnPlateau) and self._scheduler_monitor is None:
            raise ValueError(
                "expected the name of a logged metric in `lr_scheduler_monitor` for ReduceLROnPlateau, got none"
            )
        return scheduler

    def _complete_window(self) -> None:
        """Make the gradient a mean over its window, where the epoch ends within a window of accumulation.

        The loss of each batch was divided by the batches of a whole window.
        """
        window, batches = self.trainer.accumulate_grad_batches, batches_in_window(self.trainer)
        if batches < window and steps_after_this_batch(self.trainer):
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(window / batches)

    def _restore_monitors(self) -> None:
        """Set the metrics that schedulers monitor, which Lightning drops in manual mode.

        Raises:
            ValueError: If a plateau scheduler has none.
        """
        for config in self.trainer.lr_scheduler_configs:
            config.monitor = self._monitors.get(id(config.scheduler))
            if isinstance(config.scheduler, ReduceLROnPlateau) and config.monitor is None:
                raise ValueError("expected the name of a logged metric as `monitor` of ReduceLROnPlateau, got none")

    def _step_schedulers(self, interval: str, *, plateau: bool) -> None:
        if not self.automatic_optimization:
            step_schedulers(self, interval=interval, plateau=plateau)

    # --- hooks -------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, and the scheduler if there is one."""
        optimizer = self.build_optimizer()
        if self._scheduler_of is None:
            if self._scheduler_interval != "epoch" or self._scheduler_monitor is not None:
                raise ValueError(
                    "expected `lr_scheduler` with `lr_scheduler_interval` and `lr_scheduler_monitor`, got none for "
                    f"{self._scheduler_interval!r} and {self._scheduler_monitor!r}"
                )
            return optimizer
        scheduler = self._build_scheduler(optimizer)
        settings = {"scheduler": scheduler, "interval": self._scheduler_interval}
        if not self.automatic_optimization:
            self._monitors[id(scheduler)] = self._scheduler_monitor
            return [optimizer], [settings]  # type: ignore[return-value]
        settings["monitor"] = self._scheduler_monitor
        return {"optimizer": optimizer, "lr_scheduler": settings}  # type: ignore[return-value]

    def setup(self, stage: str) -> None:
        """Hand the accumulation to Lightning, which accumulates in automatic mode and counts steps in both."""
        if stage == "fit":
            self.trainer.accumulate_grad_batches = self.accumulate_grad_batches

    def teardown(self, stage: str) -> None:
        """Reset the accumulation of the Trainer."""
        if stage == "fit":
            self.trainer.accumulate_grad_batches = 1

    def on_fit_start(self) -> None:
        """Refuse metrics that are monitored and not logged, and gradients that cannot be clipped."""
        self._find_monitored(self._scheduler_monitor)
        if self.gradient_clip_val is not None:
            check_clipping(self.trainer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagate. The last batch of a short window of accumulation makes the gradient a mean over the window."""
        super().backward(loss, *args, **kwargs)
        if self.automatic_optimization:
            self._complete_window()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip, in both modes. Callbacks run before, and see the gradients as they were."""
        if self.gradient_clip_val is None:
            return
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            # Nothing is unscaled here. The plugin's own method refuses fused optimizers, as float16 requires.
            algorithm = GradClipAlgorithmType(self.gradient_clip_algorithm)
            Precision.clip_gradients(plugin, optimizer, self.gradient_clip_val, algorithm)
        else:
            self.clip_gradients(
                optimizer,
                gradient_clip_val=self.gradient_clip_val,
                gradient_clip_algorithm=self.gradient_clip_algorithm,
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """In manual mode, step plateau schedulers for the batch before. Its validation is over now."""
        if batch_idx > 0 and batch_idx % self.accumulate_grad_batches == 0:
            self._step_schedulers("step", plateau=True)

    def on_train_epoch_start(self) -> None:
        """Forget old gradients in an epoch without backward passes.

        Stochastic weight averaging ends with such an epoch, in which Lightning still steps the optimizer.
        """
        if self.trainer.fit_loop._skip_backward:
            self.zero_grad()
        super().on_train_epoch_start()

    def on_train_epoch_end(self) -> None:
        """In manual mode, step plateau schedulers after the epoch's metrics are logged."""
        super().on_train_epoch_end()
        self._step_schedulers("step", plateau=True)
        self._step_schedulers("epoch", plateau=True)


def _check_gradient_arguments(clip_val: float | None, clip_algorithm: str, accumulate: int) -> None:
    if clip_val is not None and not clip_val > 0:
        raise ValueError(f"expected a positive number or null in `gradient_clip_val`, got {clip_val}")
    if clip_algorithm not in ("norm", "value"):
        raise ValueError(f"expected 'norm' or 'value' in `gradient_clip_algorithm`, got {clip_algorithm!r}")
    if clip_algorithm != "norm" and clip_val is None:
        raise ValueError(f"expected `gradient_clip_val` with `gradient_clip_algorithm` {clip_algorithm!r}, got none")
    if isinstance(accumulate, bool) or accumulate < 1:
        raise ValueError(f"expected an int >= 1 in `accumulate_grad_batches`, got {accumulate}")
