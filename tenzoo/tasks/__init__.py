"""Tasks: LightningModules with a loss, which they minimize with any method."""

from tenzoo.tasks.base import Task
from tenzoo.tasks.causal_lm import CausalLMTask
from tenzoo.tasks.classification import ImageClassificationTask
from tenzoo.tasks.completion import CompletionTask
from tenzoo.tasks.distillation import DistillationTask
from tenzoo.tasks.sam import SAM
from tenzoo.tasks.supervised import SupervisedTask
from tenzoo.tasks.text_classification import TextClassificationTask

__all__ = [
    "SAM",
    "CausalLMTask",
    "CompletionTask",
    "DistillationTask",
    "ImageClassificationTask",
    "SupervisedTask",
    "Task",
    "TextClassificationTask",
]
