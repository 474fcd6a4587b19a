"""The arguments that constructors of tasks pass on to those of their base classes, for type checkers and editors."""

from typing import Literal, TypedDict

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from tenzoo.tasks.sam import SAM
from tenzoo.tasks.schedulers import Schedule


class TaskArguments(TypedDict, total=False):
    """Those of :class:`~tenzoo.tasks.Task`, which says what they are and has their defaults.

    Example:
        >>> from typing_extensions import Unpack
        >>> from tenzoo.tasks import Task
        >>> class Own(Task):
        ...     def __init__(self, size: int, **kwargs: Unpack[TaskArguments]) -> None:
        ...         super().__init__(**kwargs)
    """

    optimizer: OptimizerCallable
    lr_scheduler: Schedule | LRSchedulerCallable | None
    lr_scheduler_interval: Literal["epoch", "step"]
    lr_scheduler_monitor: str | None
    sam: SAM | None
    gradient_clip_val: float | None
    gradient_clip_algorithm: Literal["norm", "value"]
    accumulate_grad_batches: int


class SupervisedArguments(TaskArguments, total=False):
    """Also ``base_width`` of :class:`~tenzoo.tasks.SupervisedTask`."""

    base_width: int | None


class ClassificationArguments(SupervisedArguments, total=False):
    """Also those of :class:`~tenzoo.tasks.ImageClassificationTask`."""

    num_classes: int
    label_smoothing: float
    core_weight_decay: float | None
    norm_weight_decay: float | None
