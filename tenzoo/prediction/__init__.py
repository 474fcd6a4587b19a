"""Writers of predictions: callbacks that know no task, and that a task may name."""

from tenzoo.prediction.writers import (
    CompletedEntriesWriter,
    ContinuationsWriter,
    PredictedClassesWriter,
    PredictedLabelsWriter,
)

__all__ = ["CompletedEntriesWriter", "ContinuationsWriter", "PredictedClassesWriter", "PredictedLabelsWriter"]
