"""Training a network on the outputs of a trained network for the same images."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import Unpack, override

from tenzoo.tasks.arguments import ClassificationArguments
from tenzoo.tasks.classification import ImageClassificationTask
from tenzoo.training import batch_weight
from tenzoo.weight_files import load_weights_


class DistillationTask(ImageClassificationTask):
    """Fit a network to labeled images, and to the logits of a trained network, the teacher.

    The network may be a compressed one, and its teacher the dense one. With the logits ``s`` of the network, ``t`` of
    the teacher, the temperature ``T`` and the teacher's share ``λ`` the loss is ::

        (1 − λ) CE(s, labels) + λ T² KL(softmax(t/T) ‖ softmax(s/T))

    (Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2; the factor T² keeps the size of the gradients when T
    changes). The teacher is copied and does not change. It is in evaluation mode, checkpoints do not contain it, and
    SAM runs it once per batch. Everything else is as in :class:`~tenzoo.tasks.classification.ImageClassificationTask`:
    the losses of validation and test are those on labels.

    Args:
        network: As in :class:`~tenzoo.tasks.classification.ImageClassificationTask`.
        teacher: The trained network: any module that maps images to logits ``(N, num_classes)``. In YAML a
            ``class_path`` with ``init_args``.
        teacher_weights: File of the teacher's weights, as ``tenzoo compress`` reads it; null if the teacher has them.
        teacher_share: λ, in [0, 1].
        temperature: T, above 0.
        **kwargs: The other arguments of :class:`~tenzoo.tasks.classification.ImageClassificationTask`.

    Raises:
        TypeError: If ``teacher`` is not a module.
        ValueError: For a value out of its range, or a file that does not fit the teacher; while training, for logits of
            another shape.
        FileNotFoundError: If there is no such file.

    Example:
        >>> from tenzoo.models import CIFARResNet
        >>> dense, small = CIFARResNet(20), CIFARResNet(20, factorization="tt", rank=8)
        >>> task = DistillationTask(small, teacher=dense, temperature=2.0)
        >>> any("teacher" in name for name, _ in task.named_parameters())
        False
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        teacher: nn.Module,
        teacher_weights: str | None = None,
        teacher_share: float = 0.9,
        temperature: float = 4.0,
        **kwargs: Unpack[ClassificationArguments],
    ) -> None:
        super().__init__(network, **kwargs)
        self.save_hyperparameters()
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"expected an nn.Module in `teacher`, got {type(teacher).__name__}")
        if not 0 <= teacher_share <= 1:
            raise ValueError(f"expected a number in [0, 1] in `teacher_share`, got {teacher_share}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"expected a finite number > 0 in `temperature`, got {temperature}")
        teacher = copy.deepcopy(teacher)  # the caller may train or compress the original
        if teacher_weights is not None:
            if not Path(teacher_weights).is_file():
                raise FileNotFoundError(f"expected an existing file in `teacher_weights`, got {teacher_weights!r}")
            load_weights_(teacher, teacher_weights)
        self.teacher_share = teacher_share
        self.temperature = temperature
        # In a tuple, it is no submodule: it is not trained, saved, synchronized or searched for cores.
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._teacher_logits: Tensor | None = None

    @override
    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, with label smoothing in its first part."""
        images, labels = batch
        logits = self(images)
        weight = batch_weight(self)
        if not self.perturbed:  # the second pass takes the teacher's logits from the first
            self._count_correct(logits, labels)
            with torch.no_grad():
                self._teacher_logits = self.check_logits(self._teacher[0](images), len(images), "teacher")
        assert self._teacher_logits is not None
        of_labels = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        own, teachers = self._softened(logits), self._softened(self._teacher_logits)
        of_teacher = F.kl_div(own, teachers, log_target=True, reduction="batchmean")
        loss = (1 - self.teacher_share) * of_labels + self.teacher_share * self.temperature**2 * of_teacher
        return loss if weight == 1 else loss * weight

    def _softened(self, logits: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (wide / self.temperature).log_softmax(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the teacher to another device or precision together with the task."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._teacher[0]._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
