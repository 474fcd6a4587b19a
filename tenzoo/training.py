"""What tasks and callbacks ask of a running Trainer."""

from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer


def loss_scale(trainer: Trainer) -> Tensor | None:
    """The factor by which float16 training multiplies the loss, a scalar on the device; None without one.

    It is read without waiting for the device.
    """
    plugin = trainer.precision_plugin
    if not isinstance(plugin, MixedPrecision) or plugin.scaler is None:
        return None
    scale: Tensor = plugin.scaler._get_scale_async()
    return scale


def unscales_its_gradients(optimizer: Optimizer) -> bool:
    """Whether the optimizer's ``step`` divides by the loss scale itself, as fused ones do.

    Before that step the gradients of such an optimizer still carry the scale: Lightning leaves them alone.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def logs_this_step(trainer: Trainer) -> bool:
    """Whether the loggers take what is logged during the current training step.

    Ask before computing what is only to be logged: Lightning drops it on all steps but each ``log_every_n_steps``-th.
    """
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)
