"""Training and evaluation of a network that classifies images."""

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import Unpack, override

from tenzoo.prediction import PredictedClassesWriter
from tenzoo.tasks.arguments import SupervisedArguments
from tenzoo.tasks.supervised import SupervisedTask, check_num_classes


class ImageClassificationTask(SupervisedTask):
    """Fit a network to labeled images by cross-entropy.

    A batch is ``(images, labels)``: floats ``(N, C, H, W)`` as the network takes them, and int64 ``(N,)``. Logs
    ``train/loss``, ``train/images_per_s``, ``train/accuracy`` of each epoch, and from every validation or test
    ``{val,test}/{loss,accuracy}``.
    The training accuracy is measured at the weights of each batch, and under SAM in the first pass. Losses other than
    ``train/loss`` are without label smoothing.

    The optimizer gets up to three groups of parameters, by name: ``"cores"``, ``"norms"`` (the parameters of
    normalization layers, and all vectors, such as biases) and ``"rest"``. Cores and norms may have their own weight
    decay. The learning rate is the optimizer's, or follows ``base_width``.

    Args:
        network: Any module that maps images to logits ``(N, num_classes)``. In YAML a ``class_path`` with
            ``init_args``. A network given as an object is not saved with the hyperparameters: give it to
            ``load_from_checkpoint(path, network=...)`` again.
        num_classes: Number of classes.
        label_smoothing: Share of the target that is divided evenly among all classes, in [0, 1).
        core_weight_decay: Weight decay of the cores; null takes the optimizer's.
        norm_weight_decay: Weight decay of norms and biases; null takes the optimizer's.
        **kwargs: ``base_width`` of :class:`~tenzoo.tasks.SupervisedTask`, and the arguments of
            :class:`~tenzoo.tasks.base.Task`.

    Raises:
        TypeError: If ``network`` is not a module, or ``num_classes`` no integer.
        ValueError: For a value out of its range, or a weight decay for an optimizer that has none.

    Example:
        >>> from tenzoo.models import CIFARResNet
        >>> task = ImageClassificationTask(CIFARResNet(20, factorization="tr", rank=10), label_smoothing=0.1)
        >>> [group["name"] for group in task.trainable_parameters()]
        ['cores', 'norms', 'rest']
    """

    items: ClassVar[str] = "images"

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int = 10,
        label_smoothing: float = 0.0,
        core_weight_decay: float | None = None,
        norm_weight_decay: float | None = 0.0,
        **kwargs: Unpack[SupervisedArguments],
    ) -> None:
        check_num_classes(num_classes, least=2)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"expected a number in [0, 1) in `label_smoothing`, got {label_smoothing}")
        super().__init__(
            network,
            num_classes=num_classes,
            core_weight_decay=core_weight_decay,
            norm_weight_decay=norm_weight_decay,
            **kwargs,
        )
        self.save_hyperparameters()
        self.label_smoothing = label_smoothing
        # Checking its arguments, the metric would wait for the device in every step.
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.judge_by({"accuracy": accuracy}, counts_correct=True)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, C, H, W)``.

        Raises:
            ValueError: If the network gives another shape.
        """
        return self.check_logits(self.network(images), len(images))

    # --- the command line --------------------------------------------------------------------------------------

    @override
    def prediction_writer(self) -> PredictedClassesWriter:
        """A writer of classes and probabilities."""
        return PredictedClassesWriter()

    @override
    def example_input(self, data: LightningDataModule) -> Tensor | None:
        """Images of the shape that the data module has in ``image_shape``, as many as in its batches."""
        shape = getattr(data, "image_shape", None)
        return None if shape is None else torch.empty(data.hparams.get("batch_size", 1), *shape, device="meta")

    # --- steps -------------------------------------------------------------------------------------------------

    @override
    def outputs_and_targets(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits ``(N, num_classes)`` and labels ``(N,)``."""
        images, labels = batch
        return self(images), labels

    @override
    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of a batch, with label smoothing."""
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    @override
    def judged_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of a batch."""
        return F.cross_entropy(outputs, targets)

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Probabilities ``(N, num_classes)`` for a batch of images, with or without labels."""
        images = batch[0] if isinstance(batch, list | tuple) else batch
        probabilities: Tensor = self(images).float().softmax(1)
        return probabilities
