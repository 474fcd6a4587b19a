"""Learning-rate schedulers under manual optimization, where Lightning leaves them to the module."""

from typing import Literal

from lightning.pytorch import LightningModule


def step_schedulers(module: LightningModule, interval: Literal["step", "epoch"], index: int, *, plateau: bool) -> None:
    """Step the module's schedulers as Lightning does in automatic mode.

    Args:
        module: Attached to a trainer.
        interval: Which schedulers: those of every ``"step"`` or every ``"epoch"``.
        index: Index, from 0, of the batch in its epoch, or of the epoch.
        plateau: Step the ``ReduceLROnPlateau`` schedulers, or all others.

    Raises:
        ValueError: If a plateau scheduler's metric was not logged.
    """
    metrics = module.trainer.callback_metrics if plateau else {}
    for config in module.trainer.lr_scheduler_configs:
        due = config.interval == interval and (index + 1) % config.frequency == 0
        if not due or config.reduce_on_plateau != plateau:
            continue
        if not plateau:
            module.lr_scheduler_step(config.scheduler, None)
            continue
        if config.monitor not in metrics:
            raise ValueError(
                f"expected the name of a logged metric in `lr_scheduler_monitor`, got {config.monitor!r}; "
                f"logged are {sorted(metrics)}"
            )
        module.lr_scheduler_step(config.scheduler, metrics[config.monitor])
