"""Callbacks that write predictions of classes, labels and texts to a file."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from tenzoo.prediction.base import PredictionWriter


class PredictedClassesWriter(PredictionWriter):
    """Write the predicted classes to ``classes.npz`` in the log directory: ``classes`` (n,), ``probabilities`` (n, C).

    The images come in the order of the data. Where the data has ``predicted_names``, an array ``file`` says which image
    each is, and where it has ``class_names``, these are in ``classes_names``; a ``.csv`` file has the names themselves.
    An existing file is never overwritten: a number is appended to the name. Under DDP every rank predicts all images
    and the first one writes.

    Args:
        name: File name. ``.csv`` and ``.parquet`` are tables of classes and probabilities.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: For a name with another ending, or one that leads out of the log directory; while
            predicting, for predictions that are not finite.
        OSError: While predicting, if the folder cannot be written to or the disk is full.

    Example:
        >>> PredictedClassesWriter().name
        'classes.npz'
    """

    def __init__(self, name: str = "classes.npz") -> None:
        super().__init__(name)
        self._names: dict[str, list[str]] = {}

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the names of files and of classes from the data."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        found = {"file": getattr(data, "predicted_names", None), "classes": getattr(data, "class_names", None)}
        self._names = {name: list(names) for name, names in found.items() if names}
        super().on_predict_start(trainer, pl_module)

    @override
    def _arrays(self, prediction: Any) -> Mapping[str, Tensor]:
        predicted = {"classes": prediction.argmax(1), "probabilities": prediction}
        if "file" not in self._names or self._growing is None:
            return predicted
        first = self._growing.count
        return {"file": torch.arange(first, first + len(prediction)), **predicted}

    @override
    def _words(self, trainer: Trainer) -> Mapping[str, Sequence[str]]:
        return self._names

    @override
    def _column_names(self, name: str, count: int) -> list[str]:
        if name == "probabilities":
            return self._names.get("classes") or [f"p{k}" for k in range(count)]
        return ["class" if name == "classes" else name]

    @override
    def _summary(self, trainer: Trainer, count: int) -> str:
        return f"{count} predicted classes"


class PredictedLabelsWriter(PredictionWriter):
    """Write the predicted labels of texts to ``labels.csv`` in the log directory.

    A row has the ``label`` by its name, and the probability of each label in a column of its name, in the order of the
    data; for a regression it has the ``value``. An existing file is never overwritten: a number is appended to the
    name. Under DDP every rank predicts all texts and the first one writes.

    Args:
        name: File name. ``.npz`` writes arrays ``label``, ``label_names`` and ``probabilities``, or ``value``.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: For a name with another ending, or one that leads out of the log directory; while
            predicting, for predictions that are not finite.
        OSError: While predicting, if the folder cannot be written to or the disk is full.

    Example:
        >>> PredictedLabelsWriter().name
        'labels.csv'
    """

    def __init__(self, name: str = "labels.csv") -> None:
        super().__init__(name)
        self._names: list[str] = []

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the names of labels from the data."""
        self._names = [str(name) for name in getattr(trainer.datamodule, "label_names", None) or ()]  # type: ignore[attr-defined]
        super().on_predict_start(trainer, pl_module)

    @override
    def _arrays(self, prediction: Any) -> Mapping[str, Tensor]:
        if prediction.shape[1] == 1:
            return {"value": prediction[:, 0]}
        return {"label": prediction.argmax(1), "probabilities": prediction}

    @override
    def _column_names(self, name: str, count: int) -> list[str]:
        if name == "probabilities":
            self._names = self._names or [str(k) for k in range(count)]
            return self._names
        return [name]

    @override
    def _words(self, trainer: Trainer) -> Mapping[str, Sequence[str]]:
        return {"label": self._names} if "label" in self._columns else {}

    @override
    def _summary(self, trainer: Trainer, count: int) -> str:
        return f"{count} predicted {'labels' if 'label' in self._columns else 'values'}"


class ContinuationsWriter(PredictionWriter):
    """Write prompts and what continues them to ``continuations.csv`` in the log directory.

    A row has the ``prompt`` and its ``continuation`` as text. An existing file is never overwritten: a number is
    appended to the name. Under DDP every rank continues all prompts and the first one writes.

    Args:
        name: File name. ``.npz`` writes arrays of numbers ``prompt`` and ``continuation``, and the texts that they
            stand for, ``prompt_names`` and ``continuation_names``.

    Raises:
        TypeError: If ``name`` is not a string; while predicting, if the data has no vocabulary.
        ValueError: For a name with another ending, or one that leads out of the log directory.
        OSError: While predicting, if the folder cannot be written to or the disk is full.

    Example:
        >>> ContinuationsWriter().name
        'continuations.csv'
    """

    def __init__(self, name: str = "continuations.csv") -> None:
        super().__init__(name)
        self._vocabulary: Any = None
        self._texts: dict[str, list[str]] = {}

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the vocabulary from the data."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "vocabulary"):
            raise TypeError(f"expected data with a vocabulary, such as TextCorpusDataModule, got {type(data).__name__}")
        self._vocabulary, self._texts = data.vocabulary, {}
        super().on_predict_start(trainer, pl_module)

    @override
    def _arrays(self, prediction: Any) -> Mapping[str, Tensor]:
        prompts, continuations = (prediction[name].tolist() for name in ("prompt", "continuation"))
        texts = {
            "prompt": [self._vocabulary.decode(row) for row in prompts],
            "continuation": [
                "".join(self._vocabulary.continued(*row)) for row in zip(prompts, continuations, strict=True)
            ],
        }
        arrays = {}
        for name, new in texts.items():
            known = self._texts.setdefault(name, [])
            arrays[name] = torch.arange(len(known), len(known) + len(new))
            known += new
        return arrays

    @override
    def _column_names(self, name: str, count: int) -> list[str]:
        return [name]

    @override
    def _words(self, trainer: Trainer) -> Mapping[str, Sequence[str]]:
        return self._texts

    @override
    def _summary(self, trainer: Trainer, count: int) -> str:
        return f"{count} continued prompts"
