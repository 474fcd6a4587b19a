"""Training and evaluation of a network on inputs with targets."""

import math
import time
from abc import abstractmethod
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import Unpack, override

from tenzoo.cores import find_core_groups
from tenzoo.distributed import own_items
from tenzoo.tasks.arguments import TaskArguments
from tenzoo.tasks.base import Task
from tenzoo.tasks.learning_rates import (
    by_learning_rate,
    check_adaptive,
    check_base_width,
    check_scaled,
    learning_rate_factors,
)
from tenzoo.training import EpochMean, batch_weight, logs_this_step

_NO_WEIGHT = 1e-30
"""The weight of a batch that does not count in a mean. Lightning takes 0 for "unknown"."""

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def check_num_classes(num_classes: object, *, least: int) -> None:
    """Refuse what is no number of classes.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is a truth value, or below ``least``.
    """
    if not isinstance(num_classes, int):
        raise TypeError(f"expected an int >= {least} in `num_classes`, got {num_classes!r}")
    if isinstance(num_classes, bool) or num_classes < least:
        raise ValueError(f"expected an int >= {least} in `num_classes`, got {num_classes}")


class SupervisedTask(Task):
    """Fit a network to targets.

    Abstract: a subclass says what the network makes of a batch, what the loss is, and calls :meth:`judge_by`.
    Logs ``train/loss``, ``train/{items}_per_s``, ``train/accuracy`` of each epoch where outputs are classes, and from
    every validation or test ``{val,test}/loss`` and the metrics. The training accuracy is measured at the weights of
    each batch, and under SAM in the first pass.

    The optimizer gets up to three groups of parameters, by name: ``"cores"``, ``"norms"`` (the parameters of
    normalization layers, and all vectors, such as biases) and ``"rest"``. Cores and norms may have their own weight
    decay. The learning rate is the optimizer's.

    With ``base_width`` b each group is split by learning rate. A dense weight with n products to sum for an output has
    the optimizer's rate times ``b/n``, the maximal update of Adam (Yang et al. 2022, arXiv:2203.03466, table 8). Core k
    of a weight of K cores has it times ``b σ_k / (K √n_k)``: n_k products are summed where an input that was multiplied
    by the cores before it is multiplied by this one, and σ_k is the standard deviation of its entries with which the
    weight starts at variance ``1/n``. For cores that start at ``σ_k² = 1/n_k`` this is the ``b/n_k`` of Qiu et al. 2024
    (arXiv:2406.06248, section 3), divided among the cores: the steps of all of them together change the output as
    much as that of the dense weight does. Tables and vectors keep the optimizer's rate, a table that is also the head
    has that of the head.

    Args:
        network: The module that is trained.
        num_classes: Size of an output.
        core_weight_decay: Weight decay of the cores; null takes the optimizer's.
        norm_weight_decay: Weight decay of norms and biases; null takes the optimizer's.
        base_width: The width at which the optimizer's learning rate is that of a dense weight; null gives all
            parameters the same.
        **kwargs: The arguments of :class:`~tenzoo.tasks.base.Task`.

    Raises:
        TypeError: If ``network`` is not a module, or a weight decay not a number.
        ValueError: For a value out of its range, or a weight decay for an optimizer that has none.
    """

    items: ClassVar[str]
    """What a batch consists of, for the name of the speed."""

    _leaves_out_repeats = True

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int,
        core_weight_decay: float | None,
        norm_weight_decay: float | None,
        base_width: int | None = None,
        **kwargs: Unpack[TaskArguments],
    ) -> None:
        super().__init__(**kwargs)
        check_base_width(base_width)
        if not isinstance(network, nn.Module):
            raise TypeError(f"expected an nn.Module in `network`, got {type(network).__name__}")
        self._decays = {"cores": core_weight_decay, "norms": norm_weight_decay}
        for argument, decay in (("core_weight_decay", core_weight_decay), ("norm_weight_decay", norm_weight_decay)):
            if decay is not None and not isinstance(decay, Real):
                raise TypeError(f"expected a finite number >= 0 or null in `{argument}`, got {decay!r}")
            if decay is not None and not (math.isfinite(decay) and decay >= 0):
                raise ValueError(f"expected a finite number >= 0 or null in `{argument}`, got {decay}")
        self._base_width = base_width
        self._since: float | None = None
        self._items = 0
        self._judged = 0
        self.network = network
        self.num_classes = num_classes
        self.metrics = nn.ModuleDict()

    def judge_by(self, metrics: Mapping[str, Metric], *, counts_correct: bool) -> None:
        """Set the metrics of validation and test.

        Args:
            metrics: Metrics of outputs and targets by name.
            counts_correct: Whether the training accuracy is logged: outputs are logits ``(N, C)`` of classes.
        """
        for split in ("val", "test"):
            self.metrics.update({f"{split}/{name}": metric.clone() for name, metric in metrics.items()})
        if counts_correct:
            self._epoch_means["train/accuracy"] = EpochMean()

    @override
    def setup(self, stage: str) -> None:
        """Refuse data of another number of classes."""
        super().setup(stage)
        given = getattr(getattr(self.trainer, "datamodule", None), "num_classes", self.num_classes)
        if given != self.num_classes:
            raise ValueError(f"expected {given} in `num_classes`, as in the data, got {self.num_classes}")

    def check_logits(self, logits: Tensor, size: int, argument: str = "network") -> Tensor:
        """Logits of the right shape, ``(size, num_classes)``.

        Args:
            logits: Of a network.
            size: Number of items in the batch.
            argument: Name of the network, for the error.

        Raises:
            ValueError: If they have another shape.
        """
        if logits.shape != (size, self.num_classes):
            raise ValueError(
                f"expected logits of shape (N, {self.num_classes}) from `{argument}` for N = {size} {self.items}, "
                f"got {tuple(logits.shape)}"
            )
        return logits

    @abstractmethod
    def outputs_and_targets(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The network's outputs for a batch, and what they should be, both of length N."""

    @abstractmethod
    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss that is minimized, a scalar."""

    def judged_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of validation and test, a scalar."""
        return self.training_loss(outputs, targets)

    def judged_outputs(self, outputs: Tensor) -> Tensor:
        """What the metrics compare with the targets: classes ``(N,)``."""
        return outputs.argmax(1)

    def num_judged(self, targets: Tensor) -> int:
        """How many of these targets the mean of :meth:`judged_loss` is over."""
        return len(targets)

    # --- the optimizer -----------------------------------------------------------------------------------------

    @override
    def trainable_parameters(self) -> list[dict[str, Any]]:
        """The parameters in groups ``"cores"``, ``"norms"`` and ``"rest"``, without empty groups."""
        cores = {id(core) for group in find_core_groups(self) for core in group.cores}
        norms = {
            id(parameter)
            for module in self.modules()
            for parameter in module.parameters(recurse=False)
            if isinstance(module, _NORMS) or parameter.ndim <= 1
        }
        groups: dict[str, list[nn.Parameter]] = {"cores": [], "norms": [], "rest": []}
        for parameter in self.parameters():
            if parameter.requires_grad:
                name = "cores" if id(parameter) in cores else "norms" if id(parameter) in norms else "rest"
                groups[name].append(parameter)
        return [
            {"params": members, "name": name}
            | ({} if (decay := self._decays.get(name)) is None else {"weight_decay": decay})
            for name, members in groups.items()
            if members
        ]

    @override
    def build_optimizer(self) -> Optimizer:
        """The optimizer over the groups; over one group of all parameters where they have the same settings.

        Raises:
            ValueError: If it has no weight decay, and the arguments give one, or if it or a parameter does not fit
                ``base_width``.
        """
        groups = self.trainable_parameters()
        optimizer = self._optimizer_of([parameter for group in groups for parameter in group["params"]])
        decays = "weight_decay" in optimizer.param_groups[0]
        for name, argument in (("cores", "core_weight_decay"), ("norms", "norm_weight_decay")):
            if self._decays[name] and not decays:
                raise ValueError(
                    f"expected an optimizer with weight_decay with `{argument}` = {self._decays[name]}, "
                    f"got {type(optimizer).__name__}, which has none"
                )
        if self._base_width is not None:
            check_adaptive(optimizer)
            factors = learning_rate_factors(self, self._base_width)
            groups = by_learning_rate(groups, factors, optimizer.param_groups[0]["lr"])
        elif not decays:
            return optimizer
        return self._optimizer_of(groups)

    @override
    def _build_scheduler(self, optimizer: Optimizer) -> Any:
        before = [group["lr"] for group in optimizer.param_groups]
        scheduler = super()._build_scheduler(optimizer)
        if self._base_width is not None:
            check_scaled(before, [group["lr"] for group in optimizer.param_groups], scheduler)
        return scheduler

    @property
    @override
    def metric_names(self) -> set[str]:
        """Losses, the training accuracy, and the metrics of validation."""
        validated = (name for name in self.metrics if name.startswith("val/"))
        return {"train/loss_epoch", "train/loss", "val/loss", *validated, *self._epoch_means}

    @override
    def described_network(self, data: LightningDataModule) -> nn.Module:
        """The network."""
        return self.network

    # --- steps -------------------------------------------------------------------------------------------------

    @override
    def loss(self, batch: Any, batch_idx: int) -> Tensor:
        """The training loss of a batch."""
        outputs, targets = self.outputs_and_targets(batch)
        weight = batch_weight(self)
        if not self._perturbed:
            self._count_correct(outputs, targets)
        loss = self.training_loss(outputs, targets)
        return loss if weight == 1 else loss * weight

    def _count_correct(self, logits: Tensor, labels: Tensor) -> None:
        """Add a training batch to the accuracy of the epoch. A batch that repeats another process's counts as empty.

        It is added nevertheless, because each process takes part in the mean.
        """
        self._items += len(labels)
        if "train/accuracy" not in self._epoch_means:
            return
        correct = (logits.detach().argmax(1) == labels).sum()
        own = bool(batch_weight(self))
        self._epoch_means["train/accuracy"].add(correct if own else torch.zeros_like(correct), len(labels) * own)

    def _log_metrics(self, split: str) -> None:
        for name, metric in self._metrics_of(split).items():
            self.log(name, metric.compute().float(), prog_bar=split == "val", sync_dist=True)
            metric.reset()

    def _metrics_of(self, split: str) -> dict[str, Metric]:
        chosen: dict[str, Any] = {name: each for name, each in self.metrics.items() if name.startswith(f"{split}/")}
        return chosen

    def _judge(self, split: str, batch: Any) -> None:
        outputs, targets = self.outputs_and_targets(batch)
        counted = self._own(split, len(targets))
        loss = outputs.new_zeros(())
        if counted:
            loss = self.judged_loss(outputs[:counted], targets[:counted])
            judged = self.judged_outputs(outputs[:counted])
            for metric in self._metrics_of(split).values():
                metric.update(judged, targets[:counted])
        weight = self.num_judged(targets[:counted]) or _NO_WEIGHT
        self.log(f"{split}/loss", loss, batch_size=weight, sync_dist=True)

    def _own(self, split: str, size: int) -> int:
        """The number of items in a batch that no other process judges."""
        loaders = self.trainer.val_dataloaders if split == "val" else self.trainer.test_dataloaders
        own = own_items(loaders[0] if isinstance(loaders, list) else loaders)
        before, self._judged = self._judged, self._judged + size
        return size if own is None else min(max(own - before, 0), size)

    @override
    def on_validation_epoch_start(self) -> None:
        """Reset the count of items."""
        self._judged = 0

    @override
    def on_test_epoch_start(self) -> None:
        """Reset the count of items."""
        self._judged = 0

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start to measure the items per second."""
        if batch_idx == 0 or self._since is None:
            self._since, self._items = time.perf_counter(), 0
        super().on_train_batch_start(batch, batch_idx)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the items per second of all processes since the last log, without validation."""
        if self._since is not None and logs_this_step(self.trainer):
            rate = self._items * self.trainer.world_size / (time.perf_counter() - self._since)
            name = f"train/{self.items}_per_s"
            self.log(name, torch.tensor(rate), prog_bar=True)  # on the host, where it is read
            self._since, self._items = None, 0

    @override
    def on_train_epoch_end(self) -> None:
        """Log the accuracy and the loss."""
        accuracy = self._epoch_mean("train/accuracy") if "train/accuracy" in self._epoch_means else None
        if accuracy is not None:
            self.log("train/accuracy", accuracy, sync_dist=True)
        super().on_train_epoch_end()

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the metrics."""
        self._judge("val", batch)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("val")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the metrics."""
        self._judge("test", batch)

    @override
    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("test")
