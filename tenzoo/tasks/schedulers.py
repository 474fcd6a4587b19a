"""A learning-rate scheduler under manual optimization, where Lightning leaves it to the module."""

from lightning.pytorch import LightningModule
from torch.optim.lr_scheduler import ReduceLROnPlateau


def step_schedulers(module: LightningModule, *, monitor: str | None, plateau: bool) -> None:
    """Step the module's schedulers as Lightning does in automatic mode.

    Args:
        module: Attached to a trainer.
        monitor: The metric of ``ReduceLROnPlateau`` schedulers.
        plateau: Step the ``ReduceLROnPlateau`` schedulers, or all others.

    Raises:
        ValueError: If the metric was not logged.
    """
    for config in module.trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau) != plateau:
            continue
        metric = None
        if plateau:
            metrics = module.trainer.callback_metrics
            if monitor not in metrics:
                raise ValueError(
                    f"expected the name of a logged metric in `lr_scheduler_monitor`, got {monitor!r}; "
                    f"logged are {sorted(metrics)}"
                )
            metric = metrics[monitor]
        module.lr_scheduler_step(config.scheduler, metric)
