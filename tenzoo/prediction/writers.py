"""Callbacks that write predictions to a file."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from tenzoo.distributed import shared_out
from tenzoo.prediction.arrays import Array, GrowingArrays


class _Writer(Callback):
    """Writes the predictions of all batches to one file in the log directory, which appears when it is complete.

    An existing file is never overwritten: a number is appended to the name. Under DDP every rank predicts everything
    and the first one writes.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"expected a file name as str in `name`, got {name!r}")
        if Path(name).suffix not in (".npz", ".csv"):
            raise ValueError(f"expected a file name ending in .npz or .csv in `name`, got {name!r}")
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ValueError(
                f"expected a file name inside the log directory in `name`, got {name!r}; set trainer.default_root_dir "
                "to choose the folder"
            )
        self.name = name
        self._growing: GrowingArrays | None = None
        self._columns: dict[str, list[str]] = {}

    @abstractmethod
    def _arrays(self, prediction: Any) -> Mapping[str, Tensor]:
        """A batch of predictions as arrays ``(n,)`` or ``(n, m)`` by name."""

    @abstractmethod
    def _column_names(self, name: str, count: int) -> list[str]:
        """The names of the m columns of an array."""

    @abstractmethod
    def _summary(self, trainer: Trainer, count: int) -> str:
        """A description of this many predictions, for a message."""

    def _note(self, batch: Any) -> None:
        """Called with each batch that was predicted."""

    def _words(self, trainer: Trainer) -> Mapping[str, Sequence[str]]:
        """For arrays of integers the word that each stands for."""
        return {}

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data that is divided among processes, and a folder that cannot be written to."""
        if any(map(shared_out, tree_leaves(trainer.predict_dataloaders))):
            raise ValueError(
                f"expected all data in every process for {type(self).__name__}, got a DataLoader that is divided among "
                f"{trainer.world_size}; set trainer.use_distributed_sampler: false, or trainer.devices: 1"
            )
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: asked on every rank
        self._growing = GrowingArrays(Path(folder) / self.name) if trainer.is_global_zero else None

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the predictions of a batch."""
        if self._growing is None:
            return
        arrays = {name: _to_numpy(array) for name, array in self._arrays(outputs).items()}
        for name, array in arrays.items():
            self._columns[name] = self._column_names(name, array.shape[1] if array.ndim > 1 else 1)
        self._growing.add(arrays)
        self._note(batch)

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if self._growing is not None and self._growing.count:
            count = self._growing.count
            path = self._growing.finish(self._columns, self._words(trainer))
            rank_zero_info(f"wrote {self._summary(trainer, count)} to {path}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Delete what was not written."""
        if self._growing is not None:
            self._growing.discard()


class CompletedEntriesWriter(_Writer):
    """Write the completed entries to ``completed.npz`` in the log directory: ``indices`` (n, order), ``values`` (n,).

    Of a table with labels there is an array for each mode by its name, with the labels in ``{name}_names``; a ``.csv``
    file has the labels themselves.

    A message says how many of them are in cells without a known value, and how many such cells there are. An existing
    file is never overwritten: a number is appended to the name. Under DDP every rank predicts all entries and the first
    one writes.

    Args:
        name: File name. ``.csv`` writes a text file of indices and values.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: For a name that ends in neither ``.npz`` nor ``.csv``, or leads out of the log directory; while
            predicting, for predictions that are not finite.
        OSError: While predicting, if the folder cannot be written to or the disk is full.

    Example:
        >>> CompletedEntriesWriter("completed.txt")
        Traceback (most recent call last):
        ...
        ValueError: expected a file name ending in .npz or .csv in `name`, got 'completed.txt'
    """

    def __init__(self, name: str = "completed.npz") -> None:
        super().__init__(name)
        self._missing = 0
        self._labels: dict[str, list[str]] = {}

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count cells without a known value."""
        self._missing = 0
        names, labels = (getattr(trainer.datamodule, name, None) for name in ("mode_names", "labels"))  # type: ignore[attr-defined]
        if names is not None and labels is not None:
            self._labels = {name: [str(label) for label in known] for name, known in zip(names, labels, strict=True)}
        super().on_predict_start(trainer, pl_module)

    @override
    def _arrays(self, prediction: Any) -> Mapping[str, Tensor]:
        if self._labels:
            modes = zip(self._labels, prediction.index.unbind(1), strict=True)
            return {**dict(modes), "values": prediction.value}
        return {"indices": prediction.index, "values": prediction.value}

    @override
    def _words(self, trainer: Trainer) -> Mapping[str, Sequence[str]]:
        return self._labels

    @override
    def _column_names(self, name: str, count: int) -> list[str]:
        if name in self._labels:
            return [name]
        return ["value"] if name == "values" else [f"i{mode}" for mode in range(count)]

    @override
    def _note(self, batch: Any) -> None:
        self._missing += int(batch.value.isnan().sum())

    @override
    def _summary(self, trainer: Trainer, count: int) -> str:
        shape = getattr(trainer.datamodule, "shape", None)  # type: ignore[attr-defined]
        known = getattr(trainer.datamodule, "num_known", None)  # type: ignore[attr-defined]
        of_all = "" if shape is None or known is None else f" (of {math.prod(shape) - known} in all)"
        return (
            f"{count} completed entries, {self._missing} of them in cells without a known value{of_all} and "
            f"{count - self._missing} in cells with one,"
        )


class PredictedClassesWriter(_Writer):
    """Write the predicted classes to ``classes.npz`` in the log directory: ``classes`` (n,), ``probabilities`` (n, C).

    The images come in the order of the data. Where the data has ``predicted_names``, an array ``file`` says which image
    each is, and where it has ``class_names``, these are in ``classes_names``; a ``.csv`` file has the names themselves.
    An existing file is never overwritten: a number is appended to the name. Under DDP every rank predicts all images
    and the first one writes.

    Args:
        name: File name. ``.csv`` writes a text file of classes and probabilities.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: For a name that ends in neither ``.npz`` nor ``.csv``, or leads out of the log directory; while
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


class PredictedLabelsWriter(_Writer):
    """Write the predicted labels of texts to ``labels.csv`` in the log directory.

    A row has the ``label`` by its name, and the probability of each label in a column of its name, in the order of the
    data; for a regression it has the ``value``. An existing file is never overwritten: a number is appended to the
    name. Under DDP every rank predicts all texts and the first one writes.

    Args:
        name: File name. ``.npz`` writes arrays ``label``, ``label_names`` and ``probabilities``, or ``value``.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: For a name that ends in neither ``.npz`` nor ``.csv``, or leads out of the log directory; while
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


class ContinuationsWriter(_Writer):
    """Write prompts and what continues them to ``continuations.csv`` in the log directory.

    A row has the ``prompt`` and its ``continuation`` as text. An existing file is never overwritten: a number is
    appended to the name. Under DDP every rank continues all prompts and the first one writes.

    Args:
        name: File name. ``.npz`` writes arrays of numbers ``prompt`` and ``continuation``, and the texts that they
            stand for, ``prompt_names`` and ``continuation_names``.

    Raises:
        TypeError: If ``name`` is not a string; while predicting, if the data has no vocabulary.
        ValueError: For a name that ends in neither ``.npz`` nor ``.csv``, or leads out of the log directory.
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


def _to_numpy(array: Tensor) -> Array:
    wide = array if not array.is_floating_point() else array.to(torch.promote_types(array.dtype, torch.float32))
    values: Array = wide.detach().cpu().numpy()  # numpy has no bfloat16
    return values
