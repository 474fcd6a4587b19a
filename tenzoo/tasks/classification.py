"""Training and evaluation of a network that classifies images."""

import math
import time
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from tenzoo.cores import find_core_groups
from tenzoo.distributed import own_items
from tenzoo.prediction import PredictedClassesWriter
from tenzoo.tasks.base import Task
from tenzoo.training import EpochMean, batch_weight, logs_this_step

_NO_WEIGHT = 1e-30
"""The weight of a batch that does not count in a mean. Lightning takes 0 for "unknown"."""

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class ImageClassificationTask(Task):
    """Fit a network to labeled images by cross-entropy.

    A batch is ``(images, labels)``: floats ``(N, C, H, W)`` as the network takes them, and int64 ``(N,)``. Logs
    ``train/loss``, ``train/images_per_s``, ``train/accuracy`` of each epoch, and from every validation or test
    ``{val,test}/{loss,accuracy}``.
    The training accuracy is measured at the weights of each batch, and under SAM in the first pass. Losses other than
    ``train/loss`` are without label smoothing.

    The optimizer gets up to three groups of parameters, by name: ``"cores"``, ``"norms"`` (the parameters of
    normalization layers, and all vectors, such as biases) and ``"rest"``. Cores and norms may have their own weight
    decay. The learning rate is the optimizer's.

    Args:
        network: Any module that maps images to logits ``(N, num_classes)``. In YAML a ``class_path`` with
            ``init_args``. A network given as an object is not saved with the hyperparameters: give it to
            ``load_from_checkpoint(path, network=...)`` again.
        num_classes: Number of classes.
        label_smoothing: Share of the target that is divided evenly among all classes, in [0, 1).
        core_weight_decay: Weight decay of the cores; null takes the optimizer's.
        norm_weight_decay: Weight decay of norms and biases; null takes the optimizer's.
        **kwargs: The arguments of :class:`~tenzoo.tasks.base.Task`.

    Raises:
        TypeError: If ``network`` is not a module.
        ValueError: For a value out of its range, or a weight decay for an optimizer that has none.

    Example:
        >>> from tenzoo.models import CIFARResNet
        >>> task = ImageClassificationTask(CIFARResNet(20, factorization="tr", rank=10), label_smoothing=0.1)
        >>> [group["name"] for group in task.trainable_parameters()]
        ['cores', 'norms', 'rest']
    """

    _leaves_out_repeats = True

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int = 10,
        label_smoothing: float = 0.0,
        core_weight_decay: float | None = None,
        norm_weight_decay: float | None = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        if not isinstance(network, nn.Module):
            raise TypeError(f"expected an nn.Module in `network`, got {type(network).__name__}")
        if isinstance(num_classes, bool) or num_classes < 2:
            raise ValueError(f"expected an int >= 2 in `num_classes`, got {num_classes}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"expected a number in [0, 1) in `label_smoothing`, got {label_smoothing}")
        self._decays = {"cores": core_weight_decay, "norms": norm_weight_decay}
        for argument, decay in (("core_weight_decay", core_weight_decay), ("norm_weight_decay", norm_weight_decay)):
            if decay is not None and not (math.isfinite(decay) and decay >= 0):
                raise ValueError(f"expected a finite number >= 0 or null in `{argument}`, got {decay}")
        self._since: float | None = None
        self._images = 0
        self._judged = 0
        self.network = network
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        # Checking its arguments, the metric would wait for the device in every step.
        self.accuracy = nn.ModuleDict(
            {
                f"{split}/accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False)
                for split in ("val", "test")
            }
        )
        self._epoch_means["train/accuracy"] = EpochMean()

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, C, H, W)``.

        Raises:
            ValueError: If the network gives another shape.
        """
        return self._logits_from(self.network, "network", images)

    def _logits_from(self, network: nn.Module, argument: str, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of a network, with the argument's name for the error."""
        logits: Tensor = network(images)
        if logits.shape != (len(images), self.num_classes):
            raise ValueError(
                f"expected logits of shape (N, {self.num_classes}) from `{argument}` for N = {len(images)} images, "
                f"got {tuple(logits.shape)}"
            )
        return logits

    @override
    def setup(self, stage: str) -> None:
        """Refuse data of another number of classes."""
        super().setup(stage)
        given = getattr(getattr(self.trainer, "datamodule", None), "num_classes", self.num_classes)
        if given != self.num_classes:
            raise ValueError(f"expected {given} in `num_classes`, as in the data, got {self.num_classes}")

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
        """The optimizer over the groups; over one group of all parameters if it has no weight decay.

        Raises:
            ValueError: If it has none, and the arguments give one.
        """
        groups = self.trainable_parameters()
        optimizer = self._optimizer_of([parameter for group in groups for parameter in group["params"]])
        if "weight_decay" in optimizer.param_groups[0]:
            return self._optimizer_of(groups)
        for name, argument in (("cores", "core_weight_decay"), ("norms", "norm_weight_decay")):
            if self._decays[name]:
                raise ValueError(
                    f"expected an optimizer with weight_decay with `{argument}` = {self._decays[name]}, "
                    f"got {type(optimizer).__name__}, which has none"
                )
        return optimizer

    @property
    @override
    def metric_names(self) -> set[str]:
        """Loss and accuracy in training and validation."""
        return {"train/loss_epoch", *(f"{split}/{name}" for split in ("train", "val") for name in ("loss", "accuracy"))}

    # --- the command line --------------------------------------------------------------------------------------

    @override
    def prediction_writer(self) -> PredictedClassesWriter:
        """A writer of classes and probabilities."""
        return PredictedClassesWriter()

    @override
    def described_network(self, data: LightningDataModule) -> nn.Module:
        """The network."""
        return self.network

    @override
    def example_input(self, data: LightningDataModule) -> Tensor | None:
        """Images of the shape that the data module has in ``image_shape``, as many as in its batches."""
        shape = getattr(data, "image_shape", None)
        return None if shape is None else torch.empty(data.hparams.get("batch_size", 1), *shape, device="meta")

    # --- steps -------------------------------------------------------------------------------------------------

    @override
    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch, with label smoothing."""
        images, labels = batch
        logits = self(images)
        weight = batch_weight(self)
        if not self._perturbed:
            self._count_correct(logits, labels)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss if weight == 1 else loss * weight

    def _count_correct(self, logits: Tensor, labels: Tensor) -> None:
        """Add a training batch to the accuracy of the epoch. A batch that repeats another process's counts as empty.

        It is added nevertheless, because each process takes part in the mean.
        """
        correct = (logits.detach().argmax(1) == labels).sum()
        own = bool(batch_weight(self))
        self._epoch_means["train/accuracy"].add(correct if own else torch.zeros_like(correct), len(labels) * own)

    def _accuracy_of(self, split: str) -> MulticlassAccuracy:
        return self.accuracy[f"{split}/accuracy"]  # type: ignore[return-value]

    def _log_accuracy(self, split: str) -> None:
        metric = self._accuracy_of(split)
        self.log(f"{split}/accuracy", metric.compute(), prog_bar=split == "val", sync_dist=True)
        metric.reset()

    def _judge(self, split: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        counted = self._own(split, len(labels))
        loss = logits.new_zeros(())
        if counted:
            loss = F.cross_entropy(logits[:counted], labels[:counted])
            self._accuracy_of(split).update(logits[:counted].argmax(1), labels[:counted])
        self.log(f"{split}/loss", loss, batch_size=counted or _NO_WEIGHT, sync_dist=True)

    def _own(self, split: str, size: int) -> int:
        """The number of images in a batch that no other process judges."""
        loaders = self.trainer.val_dataloaders if split == "val" else self.trainer.test_dataloaders
        own = own_items(loaders[0] if isinstance(loaders, list) else loaders)
        before, self._judged = self._judged, self._judged + size
        return size if own is None else min(max(own - before, 0), size)

    @override
    def on_validation_epoch_start(self) -> None:
        """Reset the count of images."""
        self._judged = 0

    @override
    def on_test_epoch_start(self) -> None:
        """Reset the count of images."""
        self._judged = 0

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start to measure the images per second."""
        if batch_idx == 0 or self._since is None:
            self._since, self._images = time.perf_counter(), 0
        super().on_train_batch_start(batch, batch_idx)

    @override
    def on_train_batch_end(self, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the images per second of all processes since the last log, without validation."""
        self._images += len(batch[1])
        if self._since is not None and logs_this_step(self.trainer):
            rate = self._images * self.trainer.world_size / (time.perf_counter() - self._since)
            self.log("train/images_per_s", torch.tensor(rate), prog_bar=True)  # on the host, where it is read
            self._since, self._images = None, 0

    @override
    def on_train_epoch_end(self) -> None:
        """Log the accuracy and the loss."""
        accuracy = self._epoch_mean("train/accuracy")
        if accuracy is not None:
            self.log("train/accuracy", accuracy, sync_dist=True)
        super().on_train_epoch_end()

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the metrics."""
        self._judge("val", batch)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the accuracy."""
        self._log_accuracy("val")

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the metrics."""
        self._judge("test", batch)

    @override
    def on_test_epoch_end(self) -> None:
        """Log the accuracy."""
        self._log_accuracy("test")

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Probabilities ``(N, num_classes)`` for a batch of images, with or without labels."""
        images = batch[0] if isinstance(batch, list | tuple) else batch
        probabilities: Tensor = self(images).float().softmax(1)
        return probabilities
