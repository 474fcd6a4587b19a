"""What a task logs: the loss, means over an epoch, and metrics that are those of all processes."""

from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torchmetrics import MetricCollection

from tenzoo.tasks.checks import check_modes, check_plateaus, searches_learning_rate
from tenzoo.tasks.ranks import as_of_all_ranks, logged_names, warn_of_repeats
from tenzoo.training import (
    EpochMean,
    LossWatch,
    batch_items,
    check_finite,
    check_last_loss,
    logs_this_step,
    mean_over_ranks,
    steps_so_far,
)


class LoggedModule(LightningModule):
    """A LightningModule that logs its training loss, and logs alike in one process and in several."""

    _leaves_out_repeats: ClassVar[bool] = False
    """Whether the metrics count an item once that a DistributedSampler gives to two processes."""

    def __init__(self) -> None:
        super().__init__()
        self._epoch_means = {"train/loss": EpochMean()}
        self._losses = LossWatch()
        self._loss_is_monitored = False
        self._monitored: frozenset[str] = frozenset()

    @property
    def metric_names(self) -> set[str] | None:
        """The names of all metrics that training and validation log; None if they are not known in advance."""
        return None

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as LightningModule does.

        With several processes, a metric that is monitored or logged over an epoch of validation or test is reduced over
        them, as with ``sync_dist=True``.
        """
        if self._trainer is not None and self._trainer.world_size > 1:
            value = as_of_all_ranks(self, value, kwargs, monitored=name in self._monitored)
        super().log(name, value, *args, **kwargs)

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        """Log each value with :meth:`log`."""
        metrics = isinstance(dictionary, MetricCollection)
        items = dictionary.items(keep_base=False, copy_state=False) if metrics else dictionary.items()
        for name, value in items:
            self.log(name, value, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets the name of the running hook forty times a step. nn.Module would each time look for a
        # parameter, a submodule and a buffer of that name: a fifteenth of a small model's step.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _note_loss(self, loss: Tensor, batch: Any) -> None:
        """Log the loss of a batch, and add it to the mean over the items of the epoch."""
        loss, items = loss.detach(), batch_items(self, batch)
        self._epoch_means["train/loss"].add(loss * items, items)
        self._losses.add(loss, steps_so_far(self.trainer) + 1)
        if self._loss_is_monitored or logs_this_step(self.trainer):
            # On the host: Lightning's progress bar reads it again after every batch.
            value = mean_over_ranks(self.trainer, loss).cpu()
            self.log("train/loss", value, prog_bar=True, sync_dist=False)
            if not value.isfinite():  # which an overflow in float16 also causes, with finite weights
                self._check_finite()

    def _check_finite(self) -> None:
        if not searches_learning_rate(self.trainer):
            check_finite(self, when=f"after {self.trainer.global_step} steps", losses=self._losses)

    def _epoch_mean(self, name: str) -> Tensor | None:
        """The mean over the epoch that ends, None without a batch. The next epoch starts at zero."""
        mean = self._epoch_means[name].compute(self.trainer)
        self._epoch_means[name].reset()
        return mean

    def _find_monitored(self, scheduler_monitor: str | None) -> None:
        """Find the metrics that callbacks and schedulers follow.

        Raises:
            ValueError: If one of them is not logged, is compared the wrong way round, or is not there in time.
        """
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        watched = [(f"`monitor` of {type(each).__name__}", getattr(each, "monitor", None)) for each in callbacks]
        watched.append(("`lr_scheduler_monitor`", scheduler_monitor))
        names = [name for _, name in watched]
        self._loss_is_monitored = "train/loss" in names
        self._monitored = logged_names([*names, *(config.monitor for config in self.trainer.lr_scheduler_configs)])
        known = self.metric_names
        for where, name in watched:
            if known is not None and isinstance(name, str) and name not in known:
                raise ValueError(f"expected one of {sorted(known)} in {where}, got {name!r}, which is not logged")
        check_modes(self.trainer, known=known or (), watched_by_scheduler=scheduler_monitor)
        check_plateaus(self.trainer, known=known or ())

    # --- hooks -------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Forget the losses of an earlier run."""
        self._losses.reset()

    def on_train_end(self) -> None:
        """Refuse to end with a loss that is not finite.

        Raises:
            DivergenceError: With the step from which on it is not.
        """
        if not searches_learning_rate(self.trainer):
            check_last_loss(self.trainer, self._losses)

    def on_train_epoch_start(self) -> None:
        """Reset the means over the epoch."""
        for mean in self._epoch_means.values():
            mean.reset()

    def on_train_epoch_end(self) -> None:
        """Log the mean loss of the epoch.

        Raises:
            DivergenceError: If a weight is not finite.
        """
        self._check_finite()
        loss = self._epoch_mean("train/loss")
        if loss is not None:
            self.log("train/loss_epoch", loss, sync_dist=True)
            self.log("train/loss", loss, sync_dist=True, logger=False)  # for monitors; loggers have it by steps

    def on_validation_epoch_start(self) -> None:
        """Warn of items that two processes judge."""
        if not self._leaves_out_repeats:
            warn_of_repeats(self.trainer.val_dataloaders)

    def on_test_epoch_start(self) -> None:
        """Warn of items that two processes judge."""
        if not self._leaves_out_repeats:
            warn_of_repeats(self.trainer.test_dataloaders)
