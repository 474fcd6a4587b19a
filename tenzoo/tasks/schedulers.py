"""Learning-rate schedules over the whole run, and schedulers under manual optimization."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from typing_extensions import override

from tenzoo.training import steps_of_run

Schedule: TypeAlias = Literal["cosine", "one_cycle"]
"""Names of the schedules over the run. They step after every step of the optimizer."""


def check_schedule(name: str) -> None:
    """Refuse an unknown name.

    Raises:
        ValueError: With the valid names.

    Example:
        >>> check_schedule("cosine")
    """
    if name not in get_args(Schedule):
        raise ValueError(
            f"expected one of {sorted(get_args(Schedule))}, or a function that makes a scheduler, in `lr_scheduler`, "
            f"got {name!r}"
        )


def check_periods(scheduler: object) -> None:
    """Refuse a period below one step, by which torch would divide after the first epoch.

    Raises:
        ValueError: With the name of the argument.
    """
    for name in ("step_size", "T_max", "T_0"):
        period = getattr(scheduler, name, 1)
        if isinstance(period, int | float) and period < 1:
            raise ValueError(f"expected an int >= 1 as `{name}` in `lr_scheduler`, got {period}")


def schedule_over_run(name: Schedule, optimizer: Optimizer, trainer: Trainer) -> LRScheduler:
    """A schedule over all optimizer steps of the run, from the optimizer's learning rates.

    A run that is resumed with another length follows the schedule of that length.

    Args:
        name: ``"cosine"``: half a cosine from the learning rate of each parameter group down to 0. ``"one_cycle"``:
            torch's ``OneCycleLR`` with that rate as the highest.
        optimizer: A new optimizer.
        trainer: The Trainer, with its training data.

    Raises:
        ValueError: If the run has no end.
    """
    total_steps = steps_of_run(trainer, f"`lr_scheduler` {name!r}")
    if not 0 <= total_steps < math.inf:  # Lightning gives -1 for data of unknown length
        raise ValueError(
            f"expected max_steps or max_epochs on the Trainer, and data of known length, for `lr_scheduler` {name!r}, "
            "got a run without an end"
        )
    kind = _Cosine if name == "cosine" else _OneCycle
    return kind(optimizer, max(int(total_steps), 1))


class _RunSchedule(LRScheduler):
    """A schedule that keeps the length of its own run when it loads the state of a run of another length."""

    _length_settings = frozenset({"total_steps", "_schedule_phases"})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key not in self._length_settings}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in self._length_settings})
        if self.last_epoch > 0:  # the optimizer has the rates of the other length
            count = self._step_count
            self.last_epoch -= 1
            self.step()
            self._step_count = count


class _Cosine(_RunSchedule, LambdaLR):
    """``lr_t = lr/2 (1 + cos(π t/T))`` at the step t of T (Loshchilov and Hutter 2017, arXiv:1608.03983), 0 from T on.

    Args:
        optimizer: The optimizer, with the learning rate lr in each parameter group.
        total_steps: T.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
        >>> schedule = _Cosine(optimizer, 2)
        >>> [(optimizer.step(), schedule.step(), round(schedule.get_last_lr()[0], 6))[2] for _ in range(3)]
        [0.2, 0.0, 0.0]
    """

    def __init__(self, optimizer: Optimizer, total_steps: int) -> None:
        self.total_steps = total_steps
        super().__init__(optimizer, lambda step: (1 + math.cos(math.pi * min(step / self.total_steps, 1))) / 2)


class _OneCycle(_RunSchedule, OneCycleLR):
    """Torch's ``OneCycleLR`` with the optimizer's learning rates as the highest. The last rate stays after the end.

    The momentum, or Adam's first beta, is cycled in the other direction, between 0.95 and 0.85, if there is one.

    Args:
        optimizer: The optimizer, with the highest learning rate in each parameter group.
        total_steps: Steps of the optimizer.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int) -> None:
        cycles = all("betas" in group or group.get("momentum") for group in optimizer.param_groups)
        highest = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer, highest, total_steps, cycle_momentum=cycles)

    @override
    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch + 1 < self.total_steps:
            super().step(epoch)
        else:
            self.last_epoch += 1


def step_schedulers(module: LightningModule, *, interval: str, plateau: bool) -> None:
    """Step the module's schedulers as Lightning does in automatic mode.

    Args:
        module: The module, attached to a trainer.
        interval: Step the schedulers of an ``"epoch"``, or those of a ``"step"`` of the optimizer.
        plateau: Step the ``ReduceLROnPlateau`` schedulers, or all others.

    Raises:
        ValueError: If a monitored metric was not logged.
    """
    for config in module.trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau) != plateau or config.interval != interval:
            continue
        done = module.trainer.fit_loop.epoch_loop.batch_idx if interval == "step" else module.trainer.current_epoch
        if (done + 1) % config.frequency:
            continue
        metric = None
        if plateau:
            metrics = module.trainer.callback_metrics
            if config.monitor not in metrics:
                raise ValueError(
                    f"expected the name of a logged metric in `lr_scheduler_monitor`, got {config.monitor!r}; "
                    f"logged are {sorted(metrics)}"
                )
            metric = metrics[config.monitor]
        module.lr_scheduler_step(config.scheduler, metric)
