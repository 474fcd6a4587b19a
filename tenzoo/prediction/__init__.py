"""Writers of predictions: callbacks that know no task, and that a task may name."""

from tenzoo.prediction.writers import CompletedEntriesWriter, PredictedClassesWriter, PredictedLabelsWriter

__all__ = ["CompletedEntriesWriter", "PredictedClassesWriter", "PredictedLabelsWriter"]
