"""Training and evaluation of a network that classifies text, or gives a number for it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics import Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from typing_extensions import Unpack, override

from tenzoo.dynamics.shards import is_distributed
from tenzoo.models.pretrained_transformer import PretrainedTransformer, checksum, of_files
from tenzoo.prediction import PredictedLabelsWriter
from tenzoo.tasks.arguments import SupervisedArguments
from tenzoo.tasks.supervised import SupervisedTask, check_num_classes

MetricName = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]


class TextClassificationTask(SupervisedTask):
    """Fit a network to labeled texts by cross-entropy, or to numbers by mean squared error.

    A batch is a dict of tensors ``(N, length)`` as a tokenizer gives them, with ``"labels"``, int64 ``(N,)`` or floats.
    The network is called with all others by name, and returns logits ``(N, num_classes)``. Logs ``train/loss``,
    ``train/texts_per_s``, for classes ``train/accuracy`` of each epoch, and from every validation or test
    ``{val,test}/loss`` and the metrics.

    Args:
        network: The module, such as a :class:`~tenzoo.models.PretrainedTransformer`. In YAML a ``class_path`` with
            ``init_args``.
        num_classes: Number of classes; 1 for regression.
        metrics: Of ``"accuracy"``, ``"f1"`` (of class 1 where there are two, else the mean over classes),
            ``"matthews"``, ``"pearson"`` and ``"spearman"``; by default the accuracy, or both correlations.
        core_weight_decay: Weight decay of the cores; null takes the optimizer's.
        norm_weight_decay: Weight decay of norms and biases; null takes the optimizer's.
        **kwargs: ``base_width`` of :class:`~tenzoo.tasks.SupervisedTask`, and the arguments of
            :class:`~tenzoo.tasks.base.Task`.

    Raises:
        TypeError: If ``network`` is not a module, ``num_classes`` no integer, or ``metrics`` no list.
        ValueError: For a value out of its range, a metric that does not fit, or a weight decay for an optimizer that
            has none.
    """

    items: ClassVar[str] = "texts"

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int = 2,
        metrics: Sequence[MetricName] | None = None,
        core_weight_decay: float | None = None,
        norm_weight_decay: float | None = 0.0,
        **kwargs: Unpack[SupervisedArguments],
    ) -> None:
        check_num_classes(num_classes, least=1)
        super().__init__(
            network,
            num_classes=num_classes,
            core_weight_decay=core_weight_decay,
            norm_weight_decay=norm_weight_decay,
            **kwargs,
        )
        self.save_hyperparameters()
        known = _CLASS_METRICS if num_classes > 1 else _NUMBER_METRICS
        if not isinstance(metrics, list | tuple | None):
            raise TypeError(f"expected a list of metrics, of {list(known)}, in `metrics`, got {metrics!r}")
        names = metrics or (["accuracy"] if num_classes > 1 else ["pearson", "spearman"])
        for name in names:
            if not isinstance(name, str) or name not in known:
                what = "classes" if num_classes > 1 else "a regression"
                raise ValueError(f"expected metrics of {what}, of {list(known)}, in `metrics`, got {name!r}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*will save all targets and predictions in the buffer")
            self.judge_by({name: known[name](num_classes) for name in names}, counts_correct=num_classes > 1)

    @override
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits ``(N, num_classes)`` of a batch with or without labels, in single precision or a higher one.

        Raises:
            ValueError: If the network gives another shape.
        """
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = self.check_logits(self.network(**inputs), len(next(iter(inputs.values()))))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @override
    def configure_model(self) -> None:
        """Shard the frozen weights under ``ModelParallelStrategy``; cores and head stay whole in every process."""
        if self.device_mesh is None or not isinstance(self.network, PretrainedTransformer):
            return
        from tenzoo.adapters import shard_frozen_

        frozen = self.network.frozen_weights()
        if frozen and not any(map(is_distributed, frozen.values())):
            shard_frozen_(self.network, self.device_mesh["data_parallel"])

    # --- checkpoints: frozen weights stay in their files ---------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the weights of a pretrained network that training has not changed."""
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.network, PretrainedTransformer):
            frozen, known = self.network.frozen_weights(), self.network.frozen_checksum
            if frozen and not any(map(is_distributed, frozen.values())) and checksum(of_files(frozen)) == known:
                checkpoint["pretrained"] = {"path": self.network.path, "checksum": known}
                for name in frozen:
                    del checkpoint["state_dict"][f"network.{name}"]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the weights that were left out.

        Raises:
            ValueError: If the network has others.
        """
        known = checkpoint.get("pretrained")
        if known is not None and isinstance(self.network, PretrainedTransformer):
            frozen = self.network.frozen_weights()
            # Older checkpoints have a checksum that the untrained head is part of.
            if checksum(of_files(frozen)) != known["checksum"] and checksum(frozen) != known["checksum"]:
                raise ValueError(
                    f"expected the pretrained weights that the checkpoint in `ckpt_path` was trained with, those of "
                    f"{known['path']!r}, got others from {self.network.path!r}"
                )
            checkpoint["state_dict"].update({f"network.{name}": tensor.detach() for name, tensor in frozen.items()})
        super().on_load_checkpoint(checkpoint)

    # --- steps -----------------------------------------------------------------------------------------------------

    @override
    def outputs_and_targets(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits ``(N, num_classes)`` and labels ``(N,)``."""
        return self(batch), batch["labels"]

    @override
    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of a batch, or its mean squared error."""
        if self.num_classes == 1:
            return F.mse_loss(outputs.squeeze(1), targets.to(outputs.dtype))
        return F.cross_entropy(outputs, targets)

    @override
    def judged_outputs(self, outputs: Tensor) -> Tensor:
        """Classes, or numbers: ``(N,)``."""
        return outputs.squeeze(1) if self.num_classes == 1 else outputs.argmax(1)

    @override
    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Probabilities ``(N, num_classes)`` for a batch of texts, or numbers ``(N, 1)``."""
        outputs: Tensor = self(batch)
        return outputs if self.num_classes == 1 else outputs.softmax(1)

    @override
    def prediction_writer(self) -> PredictedLabelsWriter:
        """A writer of labels and probabilities."""
        return PredictedLabelsWriter()


# Checking their arguments, metrics of classes would wait for the device.
_CLASS_METRICS: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda count: MulticlassAccuracy(count, average="micro", validate_args=False),
    "f1": lambda count: (
        BinaryF1Score(validate_args=False) if count == 2 else MulticlassF1Score(count, validate_args=False)
    ),
    "matthews": lambda count: MulticlassMatthewsCorrCoef(count, validate_args=False),
}
_NUMBER_METRICS: dict[str, Callable[[int], Metric]] = {
    "pearson": lambda _: PearsonCorrCoef(),
    "spearman": lambda _: SpearmanCorrCoef(),
}
