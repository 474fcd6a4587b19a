"""What tasks and callbacks ask of a running Trainer."""

from contextlib import nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override


def scales_loss(trainer: Trainer) -> bool:
    """Whether the loss is multiplied before the backward pass, as float16 training does."""
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None


def loss_scale(trainer: Trainer) -> Tensor | None:
    """The factor by which the loss was multiplied in this step, a scalar on the device; None without one.

    It is read without waiting for the device.
    """
    plugin = trainer.precision_plugin
    return plugin.scaler._get_scale_async() if isinstance(plugin, MixedPrecision) and plugin.scaler else None


def unscales_its_gradients(optimizer: Optimizer) -> bool:
    """Whether the optimizer's ``step`` divides by the loss scale itself, as fused ones do.

    Before that step the gradients of such an optimizer still carry the scale: Lightning leaves them alone.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def gradient_scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """The factor that gradients still carry just before the step, a scalar on the device; None without one."""
    return loss_scale(trainer) if unscales_its_gradients(optimizer) else None


def settings_of(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """The parameter group of each parameter, by the parameter's ``id``."""
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}


def steps_so_far(trainer: Trainer) -> int:
    """Steps of training before the current one; a batch after which several optimizers step is one step."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def logs_this_step(trainer: Trainer) -> bool:
    """Whether the loggers take what is logged during the current training step.

    Ask before computing what is only to be logged: Lightning drops it on all steps but each ``log_every_n_steps``-th.
    """
    # What Lightning's own check comes to in training, without its search for the active loop.
    every, fast_dev_run = trainer.log_every_n_steps, trainer.fast_dev_run  # type: ignore[attr-defined]
    return bool(fast_dev_run) or (every > 0 and (steps_so_far(trainer) + 1) % every == 0)


def log_to_loggers(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Hand values to all loggers, at the current training step.

    As ``LightningModule.log`` does in the end, but at a fiftieth of its price: that one also prepares for reduction
    over epochs and ranks, which takes longer than a step of a small model.
    """
    step = steps_so_far(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step)


def batch_weight(module: LightningModule) -> float:
    """What a mean over this process's share of the training batch is multiplied by: 1, unless shares are uneven.

    The average over processes, which DDP makes of gradients, is then that of the mean over the whole batch. It comes
    from the data module, which shares out the batches.
    """
    return float(getattr(getattr(module._trainer, "datamodule", None), "batch_weight", 1.0))


class NoProfiler(PassThroughProfiler):
    """Lightning's own "no profiler", without the generator that it makes sixty times a step."""

    _nothing = nullcontext()

    @override
    def profile(self, action_name: str) -> nullcontext[None]:  # type: ignore[override]
        return self._nothing
