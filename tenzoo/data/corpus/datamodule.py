"""Running text for language models: tokens of files, in blocks."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from tenzoo.data.checks import check_fraction, check_int, check_path
from tenzoo.data.corpus.blocks import BlockLoader, PromptLoader, WindowLoader
from tenzoo.data.corpus.documents import read_documents, read_prompts
from tenzoo.data.corpus.vocabulary import Vocabulary, make_vocabulary
from tenzoo.data.resumable import ValidatedDataModule
from tenzoo.data.transfer import upload

Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Text:
    """A text as tokens.

    Args:
        tokens: int32 ``(n,)``.
        characters: How many characters those after the first stand for; 0 if some are not known to the vocabulary.
    """

    tokens: Array
    characters: int


@dataclass(frozen=True, eq=False)
class PreparedCorpus:
    """All that is known once the data is loaded.

    Args:
        splits: ``train``, ``val`` and ``test``, those that there are.
        vocabulary: Of the training text.
        fingerprint: Builtins that tell what is trained on and validated with from any other.
    """

    splits: dict[str, Text]
    vocabulary: Vocabulary
    fingerprint: dict[str, Any]


class TextCorpusDataModule(ValidatedDataModule[PreparedCorpus, BlockLoader]):
    """Running text for language models.

    A source is a text file in UTF-8, a folder of files ``*.txt``, or a ``.parquet`` file with a column ``text``. A
    file, or a row of Parquet, is a document; if there are several for training, each ends in a border token.

    Steps get a dict of ``tokens`` and ``targets``, int64 ``(N, context)``: the tokens of blocks, and the token after
    each. Training blocks resume exactly, in mid-epoch too. A checkpoint can only be loaded with its own text.

    Args:
        train: Source of the text to train on.
        validation: Source of the text to validate with; ``None`` takes the end of ``train``.
        test: Source of the text to test with; ``None`` tests with the text of validation.
        predict: Source of the prompts that prediction continues: a text file with one in each line, or any other
            source, of which each document is one.
        tokenizer: ``"characters"``, those of ``train``; ``"bpe"``, byte pairs of the text that is trained on; or a
            tokenizer, the JSON file of the package tokenizers or a folder with a ``tokenizer.json``. The token between
            documents is the ``eos_token`` of the folder's ``tokenizer_config.json``, else ``<|endoftext|>``.
        vocabulary_size: Largest number of tokens of ``"bpe"``.
        context: Tokens of a block.
        stride: Tokens between the windows of validation and test (see :class:`~tenzoo.data.WindowLoader`); ``None`` is
            the context: blocks that follow each other.
        validation_fraction: The part of the characters of ``train`` that is held out at its end if ``validation`` is
            ``None``; 0 holds out none.
        batch_size: Blocks per optimizer step, over all processes together.
        eval_batch_size: Blocks per batch elsewhere.
        steps_per_epoch: Batches per epoch; ``None`` means the whole text once.
        seed: Chooses the blocks and their order. Independent of global generators.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; from ``setup``, if a source or the tokenizer is not valid, or a text
            is too short.
        ImportError: From ``setup``, if a package is not installed.
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
        tokenizer: str = "characters",
        vocabulary_size: int = 4096,
        context: int = 256,
        stride: int | None = None,
        validation_fraction: float = 0.1,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        steps_per_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        paths = {"train": train, "validation": validation, "test": test, "predict": predict, "tokenizer": tokenizer}
        train, validation, test, predict, tokenizer = (
            check_path(value, arg=name, what="a path", optional=name not in ("train", "tokenizer"))
            for name, value in paths.items()
        )
        for name, number, least in (
            ("vocabulary_size", vocabulary_size, 257),  # the bytes and the border
            ("context", context, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("seed", seed, 0),
        ):
            check_int(number, arg=name, least=least)
        if steps_per_epoch is not None:
            check_int(steps_per_epoch, arg="steps_per_epoch", least=1)
        if stride is not None and check_int(stride, arg="stride", least=1) > context:
            raise ValueError(f"expected at most the context {context} in `stride`, got {stride}")
        check_fraction(validation_fraction, arg="validation_fraction", below_one=True)
        # Loggers are left out since they refuse a task with an argument of the same name and another value.
        self.save_hyperparameters(logger=False)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary; known after ``setup``."""
        return self.vocabulary.size

    @property
    def vocabulary(self) -> Vocabulary:
        """From text to tokens and back; known after ``setup``."""
        return self._data.vocabulary

    @property
    def splits(self) -> dict[str, Text]:
        """``train``, ``val`` and ``test``, those that there are; known after ``setup``."""
        return self._data.splits

    @override
    def _report(self) -> None:
        counts = ", ".join(f"{len(text.tokens):,} {name}" for name, text in self.splits.items())
        rank_zero_info(f"tokens: {counts}; vocabulary of {self.num_tokens:,}")

    @override
    def _move(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return {name: upload(tensor, device) for name, tensor in batch.items()}

    @override
    def _make_train_loader(self, **process: Any) -> BlockLoader:
        names = ("context", "batch_size", "steps_per_epoch", "seed")
        return BlockLoader(self.splits["train"].tokens, **{name: self.hparams[name] for name in names}, **process)

    @override
    def val_dataloader(self) -> list[WindowLoader]:
        """One loader per name of :attr:`eval_split_names`."""
        return [self._windows(name) for name in self.eval_split_names]

    @override
    def test_dataloader(self) -> WindowLoader:
        """The windows of ``test``, or of ``val`` without one.

        Raises:
            ValueError: If there is neither.
        """
        name = "test" if "test" in self.splits else "val"
        if name not in self.splits:
            raise ValueError("expected a file or a folder in `test`, got None, and no text of validation")
        return self._windows(name)

    @override
    def predict_dataloader(self) -> PromptLoader:
        """The prompts of ``predict``, one by one.

        Raises:
            FileNotFoundError: If the source is missing.
            ValueError: If there is none, or a prompt is empty or has a character that the vocabulary does not know.
        """
        source: str | None = self.hparams["predict"]
        if source is None:
            raise ValueError("expected a file of prompts in `predict`, got None; give one to predict")
        prompts = [self._prompt(text, place) for place, text in enumerate(read_prompts(source), 1)]
        return PromptLoader(prompts)

    def _prompt(self, text: str, place: int) -> Array:
        try:
            tokens = self.vocabulary.encode(text, arg="predict")
        except ValueError as error:
            raise ValueError(f"{error} of prompt {place}") from error
        if not len(tokens):
            raise ValueError(
                f"expected prompts of at least one token in `predict`, got none in prompt {place}: {text!r}"
            )
        return tokens

    def _windows(self, name: str) -> WindowLoader:
        given = self.hparams
        context: int = given["context"]
        return WindowLoader(
            self.splits[name].tokens,
            context=context,
            stride=given["stride"] or context,
            batch_size=given["eval_batch_size"],
        )

    @override
    def _prepare(self) -> PreparedCorpus:
        given = self.hparams
        names = {"train": "train", "validation": "val", "test": "test"}
        documents = {names[arg]: read_documents(given[arg], arg=arg) for arg in names if given[arg] is not None}
        known = documents["train"]
        if "val" not in documents and given["validation_fraction"] > 0:
            documents["train"], documents["val"] = _cut(documents["train"], given["validation_fraction"])
        if given["tokenizer"] != "characters":  # characters are not learned, and rare ones may all be in the end
            known = documents["train"]
        vocabulary = make_vocabulary(given["tokenizer"], known, given["vocabulary_size"])
        splits = {}
        for name, texts in documents.items():
            arg = "train" if name == "val" and given["validation"] is None else {"val": "validation"}.get(name, name)
            tokens = vocabulary.encode_all(texts, arg=arg)
            least = given["context"] + 1 if name == "train" else 2
            if len(tokens) < least:
                raise ValueError(f"expected at least {least} tokens for {name} in `{arg}`, got {len(tokens)}")
            splits[name] = Text(tokens, _characters(texts, tokens, vocabulary))
        seen = {name: _checksum(splits[name].tokens) for name in ("train", "val") if name in splits}
        return PreparedCorpus(splits, vocabulary, {"vocabulary": vocabulary.state, "checksum": seen})


def _characters(texts: list[str], tokens: Array, vocabulary: Vocabulary) -> int:
    unknown = 0 if vocabulary.unknown is None else int((tokens == vocabulary.unknown).sum())
    if unknown:
        rank_zero_info(f"{unknown:,} of {len(tokens):,} tokens are unknown to the tokenizer: no bits per character")
        return 0
    if not vocabulary.keeps(texts, tokens):
        rank_zero_info("the tokenizer does not keep all of the text: no bits per character")
        return 0
    return sum(map(len, texts)) - len(vocabulary.decode(tokens[:1].tolist()))


def _cut(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """All but the last characters, and these."""
    left = sum(map(len, documents)) - int(fraction * sum(map(len, documents)))
    first: list[str] = []
    for number, document in enumerate(documents):
        if len(document) > left:
            rest = [document[left:], *documents[number + 1 :]]
            return [*first, *([document[:left]] if left else [])], rest
        first.append(document)
        left -= len(document)
    return first, []


def _checksum(tokens: Array) -> str:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).hexdigest()
