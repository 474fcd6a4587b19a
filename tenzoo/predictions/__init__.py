"""Callbacks that write predictions to a file."""

from tenzoo.predictions.writers import CompletedEntriesWriter, PredictedClassesWriter

__all__ = ["CompletedEntriesWriter", "PredictedClassesWriter"]
