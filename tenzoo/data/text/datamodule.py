"""Labeled texts from files or the hub: split by seed, tokenized once, in batches of similar lengths."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from tenzoo.data.checks import check_fraction, check_int, check_path
from tenzoo.data.resumable import ValidatedDataModule
from tenzoo.data.text.batches import Padding, SequentialTextLoader, TextBatch, TextLoader, Texts, upload_batch
from tenzoo.data.text.cache import default_cache
from tenzoo.data.text.columns import Template
from tenzoo.data.text.labels import LabelKind, Labels, has_labels
from tenzoo.data.text.preparation import PreparedTexts, Tokenization, checksum
from tenzoo.data.text.splits import split_rows
from tenzoo.data.text.tables import Table, read_table


class TextDataModule(ValidatedDataModule[PreparedTexts, TextLoader]):
    """Labeled texts, or pairs of them, for classification or regression.

    A source is a file that ends in ``.tsv`` (as GLUE's, without quoting), ``.csv``, ``.jsonl`` or ``.parquet``, or the
    name of a data set of the hub as ``name``, ``name:config`` or ``name:config:split``. Labels are names of classes,
    which are numbered in the order of the alphabet, integers from 0, or other numbers for regression; ``label_kind``
    says what labels are that are other classes, such as 1 to 5, or integers for regression.

    Steps get a dict: ``input_ids`` and ``attention_mask``, with some tokenizers ``token_type_ids``, all int64
    ``(N, length)`` and padded to the longest text of the batch, and ``labels`` ``(N,)``, int64, or float32 for
    regression. Prediction gets no ``labels``.

    Training batches have texts of similar lengths (see :class:`~tenzoo.data.TextLoader`) and resume exactly, in
    mid-epoch too. Validation goes through ``val``, prediction through ``predict``, or ``test`` without one; with
    several processes each of them sees all texts. A checkpoint can only be loaded with its own training and validation
    texts.

    Tokens are kept on the disk, under a checksum of the texts, the tokenizer and the settings.

    Args:
        train: Source of the texts to train on.
        validation: Source of the texts to validate with; ``None`` holds out a part of ``train``, chosen by seed from
            each class.
        test: Source of the texts to test with.
        predict: Source of the texts to predict.
        tokenizer: Folder of a tokenizer of transformers, a GGUF file, or a name on the hub.
        text: The column of text, or two for pairs; ``None`` finds the names that GLUE has.
        label: The column of labels.
        label_kind: ``"classes"`` makes each distinct label a class of that name, where 1 and 1.0 are one, in the order
            of the numbers if all are numbers, else of the alphabet; ``"numbers"`` makes all numbers for regression;
            ``None`` lets the labels tell, as above.
        per_class: Number of examples of each class to train on, chosen by seed; ``None`` takes all. What is held out
            for validation is then at most as many.
        validation_fraction: The part of each class that is held out if ``validation`` is ``None``; 0 holds out none.
        max_length: Tokens per text, those that the tokenizer adds included; longer texts are cut.
        template: A text with columns in braces, such as ``"{sentence} It was"``, in place of ``text``. Of long texts
            the cells are cut, not the rest.
        batch_size: Texts per optimizer step, over all processes together.
        eval_batch_size: Texts per batch elsewhere.
        seed: Chooses the split, the examples and the order of batches. Independent of global generators.
        cache: Folder of tokens; ``None`` is ``tenzoo/text`` in the user's folder of caches.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; from ``setup``, if a source or the tokenizer is not valid.
        ImportError: From ``setup``, if transformers is not installed.
        FileNotFoundError: From ``setup``, if a file is missing.
    """

    _mismatch_reason = "its numbers would not compare"

    def __init__(
        self,
        train: str,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        *,
        tokenizer: str,
        text: str | list[str] | None = None,
        label: str = "label",
        label_kind: LabelKind | None = None,
        per_class: int | None = None,
        validation_fraction: float = 0.1,
        max_length: int = 128,
        template: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        train, validation, test, predict = (
            check_path(source, arg=name, what="a path or a name", optional=name != "train")
            for name, source in sources.items()
        )
        tokenizer = check_path(tokenizer, arg="tokenizer", what="a path or a name")
        cache = check_path(cache, arg="cache", what="a path or a name", optional=True)
        if template is not None and text is not None:
            raise ValueError(f"expected `text` or `template`, got both: {text!r} and {template!r}")
        self._columns, self._template = _columns(text), _parsed(template)
        filled = None if self._template is None else self._template.columns
        _check_label(label, label_kind, {"text": self._columns, "template": filled})
        if per_class is not None:
            check_int(per_class, arg="per_class", least=1)
        counts = {"max_length": max_length, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        for name, value in counts.items():
            check_int(value, arg=name, least=1)
        check_int(seed, arg="seed", least=0)
        check_fraction(validation_fraction, arg="validation_fraction", below_one=True)
        # Loggers are left out since they refuse a task with an argument of the same name and another value.
        self.save_hyperparameters(logger=False)

    @property
    def num_classes(self) -> int:
        """Number of classes, 1 for regression; known after ``setup``."""
        return self._data.labels.num_classes

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes by number, ``None`` for regression; known after ``setup``."""
        names = self._data.labels.names
        return None if names is None else list(names)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; known after ``setup``."""
        return self._data.tokenizer

    @property
    def splits(self) -> dict[str, Texts]:
        """``train``, ``val``, ``test`` and ``predict``, those that there are; known after ``setup``."""
        return self._data.splits

    @override
    def _move(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        tensors = batch.tensors if isinstance(batch, TextBatch) else batch
        return (
            upload_batch(tensors, device) if isinstance(tensors, dict) else super()._move(batch, device, dataloader_idx)
        )

    @override
    def _make_train_loader(self, **process: Any) -> TextLoader:
        return TextLoader(
            self.splits["train"],
            self._padding,
            batch_size=self.hparams["batch_size"],
            seed=self.hparams["seed"],
            wrap=self._wrap,
            **process,
        )

    @override
    def val_dataloader(self) -> list[SequentialTextLoader]:
        """One loader per name of :attr:`eval_split_names`."""
        return [self._sequential(self.splits[name]) for name in self.eval_split_names]

    @override
    def test_dataloader(self) -> SequentialTextLoader:
        """The texts of ``test``.

        Raises:
            ValueError: If there are none, or they have no labels.
        """
        texts = self.splits.get("test")
        if texts is None:
            raise ValueError("expected a file or a name in `test`, got None; give one to test with")
        if texts.labels is None:
            column, source = self.hparams["label"], self.hparams["test"]
            raise ValueError(f"expected labels in column {column!r} of `test` to test with, got none in {source!r}")
        return self._sequential(texts)

    @override
    def predict_dataloader(self) -> SequentialTextLoader:
        """The texts of ``predict``, or of ``test`` without one.

        Raises:
            ValueError: If there are none.
        """
        texts = self.splits.get("predict") or self.splits.get("test")
        if texts is None:
            raise ValueError("expected a file or a name in `predict`, got None; give one to predict")
        return self._sequential(Texts(texts.tokens))

    @property
    def _padding(self) -> Padding:
        tokenizer = self.tokenizer
        return Padding(tokenizer.pad_token_id, tokenizer.pad_token_type_id, tokenizer.padding_side == "left")

    @property
    def _wrap(self) -> bool:
        return self.trainer is not None and self.num_classes == 1

    def _sequential(self, texts: Texts) -> SequentialTextLoader:
        return SequentialTextLoader(texts, self._padding, batch_size=self.hparams["eval_batch_size"], wrap=self._wrap)

    @override
    def _prepare(self) -> PreparedTexts:
        given = self.hparams
        names = [name for name in ("train", "validation", "test", "predict") if given[name] is not None]
        tables = {name: read_table(given[name], arg=name) for name in names}
        labels = Labels.of(tables["train"], given["label"], given["label_kind"])
        targets = {name: self._targets(name, table, labels) for name, table in tables.items()}
        train, held = self._rows(targets["train"], labels)
        tokenization = Tokenization(
            given["tokenizer"],
            columns=self._columns,
            label=given["label"],
            template=self._template,
            max_length=given["max_length"],
            cache=default_cache() if given["cache"] is None else Path(given["cache"]),
        )
        texts = {name: Texts(tokenization.tokens(table), targets[name]) for name, table in tables.items()}
        whole = texts.pop("train")
        val = texts.pop("validation", None) or whole.take(held)
        splits = {"train": whole.take(train)} | ({"val": val} if len(val) > 0 else {}) | texts
        seen = {name: checksum(splits[name]) for name in ("train", "val") if name in splits}
        fingerprint = {"label_names": None if labels.names is None else list(labels.names), "checksum": seen}
        return PreparedTexts(splits, labels, tokenization.tokenizer, fingerprint)

    def _targets(self, name: str, table: Table, labels: Labels) -> Tensor | None:
        column = self.hparams["label"]
        if name == "predict" or (name == "test" and not has_labels(table, column)):
            return None
        return labels.encode(table, column)

    def _rows(self, targets: Tensor | None, labels: Labels) -> tuple[Tensor, Tensor]:
        """The rows of ``train`` to train on, and those that are held out."""
        per_class, fraction = self.hparams["per_class"], self.hparams["validation_fraction"]
        if per_class is not None and labels.names is None:
            remedy = "" if labels.kind else "; give 'classes' in `label_kind` if they are classes"
            raise ValueError(f"expected None in `per_class` for labels that are numbers, got {per_class}{remedy}")
        assert targets is not None
        return split_rows(
            targets,
            labels.names,
            per_class=per_class,
            fraction=fraction if self.hparams["validation"] is None else 0.0,
            seed=self.hparams["seed"],
        )

    @override
    def _report(self) -> None:
        """One line on what was read."""
        names, longest = self.label_names, self.hparams["max_length"]
        kind = (
            "numbers" if names is None else f"{len(names)} classes ({', '.join(names[:10])}{', …' * (len(names) > 10)})"
        )
        counts = ", ".join(f"{len(texts)} {name}" for name, texts in self.splits.items())
        full = sum(int((texts.tokens.lengths == longest).sum()) for texts in self.splits.values())
        cut = f"; {full} fill the {longest} tokens of `max_length`, where longer texts are cut" if full else ""
        rank_zero_info(f"texts: {counts}; labels are {kind}{cut}")


def _check_label(label: object, kind: object, texts: Mapping[str, Sequence[str] | None]) -> None:
    if not isinstance(label, str):
        raise TypeError(f"expected the name of a column in `label`, got {label!r}")
    if kind not in (None, "classes", "numbers"):
        raise ValueError(f"expected 'classes', 'numbers' or None in `label_kind`, got {kind!r}")
    for arg, columns in texts.items():
        if columns is not None and label in columns:
            raise ValueError(f"expected columns other than {label!r}, that of `label`, in `{arg}`, got {list(columns)}")


def _columns(text: object) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = (text,) if isinstance(text, str) else text
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"expected the name of a column in `text`, or two, got {text!r}")
    if len(names) not in (1, 2):
        raise ValueError(f"expected the name of a column in `text`, or two, got {text!r}")
    return tuple(names)


def _parsed(template: object) -> Template | None:
    if not isinstance(template, str | None):
        raise TypeError(f"expected a text with columns in braces in `template`, got {template!r}")
    return None if template is None else Template.parse(template)
