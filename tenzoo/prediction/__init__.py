"""Writers of predictions: callbacks that know no task, and that a task may name."""

from tenzoo.prediction.base import PredictionWriter
from tenzoo.prediction.completed import CompletedEntriesWriter
from tenzoo.prediction.writers import ContinuationsWriter, PredictedClassesWriter, PredictedLabelsWriter

__all__ = [
    "CompletedEntriesWriter",
    "ContinuationsWriter",
    "PredictedClassesWriter",
    "PredictedLabelsWriter",
    "PredictionWriter",
]
