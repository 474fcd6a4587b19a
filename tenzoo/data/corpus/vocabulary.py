"""Vocabularies: from text to numbers and back."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from tenzoo.data.checks import MISSING_EXTRA

Array = npt.NDArray[np.int32]

BORDER = "<|endoftext|>"
"""The token between two documents, where a tokenizer does not name its own."""

_UNFINISHED = "\ufffd"
"""What stands for bytes that are no character yet."""
_REMEMBERED = 16
"""Tokens that are decoded together with a new one: many decoders treat the first one otherwise."""


class Vocabulary(ABC):
    """Maps text to numbers below its size, and back."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many tokens there are."""

    @property
    @abstractmethod
    def border(self) -> int | None:
        """The token after each document; None where there is one document."""

    @property
    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Builtins that :func:`vocabulary_of` makes it from again."""

    @abstractmethod
    def encode(self, text: str, *, arg: str) -> Array:
        """The tokens of a text.

        Args:
            text: Any text.
            arg: The argument that it came from, for the error.

        Raises:
            ValueError: If a character is not known.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""

    def continued(self, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
        """The text that each token adds to a prompt; bytes wait until they are a character."""
        seen = list(prompt)[-_REMEMBERED:]
        before = self.decode(seen)
        for token in tokens:
            seen.append(token)
            text = self.decode(seen)
            if not text.endswith(_UNFINISHED):
                yield text[len(before) :]
                seen = seen[-_REMEMBERED:]
                before = self.decode(seen)
        yield self.decode(seen)[len(before) :]

    @property
    def unknown(self) -> int | None:
        """The token of what is not known; None where all text is known, or refused."""
        return None

    def keeps(self, documents: Sequence[str], tokens: Array) -> bool:
        """Whether the tokens that :meth:`encode_all` made of documents have all of their text."""
        return True

    def encode_all(self, documents: Sequence[str], *, arg: str) -> Array:
        """The tokens of all documents, with a border after each where there is one.

        Raises:
            ValueError: As :meth:`encode`.
        """
        end = [] if self.border is None else [np.array([self.border], dtype=np.int32)]
        parts = [part for text in documents for part in (self.encode(text, arg=arg), *end)]
        return np.concatenate(parts) if parts else np.array([], dtype=np.int32)


class Characters(Vocabulary):
    """Each character is a token; they are numbered in the order of their code points, the border after them.

    Args:
        characters: All of them, each once.
        border: Whether there is a border.

    Example:
        >>> known = Characters("abn", border=False)
        >>> known.encode("banana", arg="train").tolist(), known.decode([1, 0])
        ([1, 0, 2, 0, 2, 0], 'ba')
    """

    def __init__(self, characters: str, *, border: bool) -> None:
        self._characters = "".join(sorted(characters))
        self._border = border
        self._codes = np.array([ord(character) for character in self._characters], dtype=np.uint32)

    @property
    @override
    def size(self) -> int:
        return len(self._characters) + self._border

    @property
    @override
    def border(self) -> int | None:
        return len(self._characters) if self._border else None

    @property
    @override
    def state(self) -> dict[str, Any]:
        return {"characters": self._characters, "border": self._border}

    @override
    def encode(self, text: str, *, arg: str) -> Array:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        found = np.searchsorted(self._codes, codes)
        unknown = self._codes[np.minimum(found, len(self._codes) - 1)] != codes
        if unknown.any():
            place = int(unknown.argmax())
            raise ValueError(
                f"expected the {len(self._characters)} characters of the training text in `{arg}`, got {text[place]!r} "
                f"at place {place}; tokenizer 'bpe' takes any text"
            )
        return found.astype(np.int32)

    @override
    def decode(self, tokens: Sequence[int]) -> str:
        return "".join("\n" if token == self.border else self._characters[token] for token in tokens)


class BytePairs(Vocabulary):
    """Pairs of bytes that are often next to each other are tokens (Sennrich et al. 2016, arXiv:1508.07909).

    Args:
        tokenizer: A tokenizer of the package ``tokenizers``, as its JSON.
        border: The token between documents; ``None`` if there is none.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If it is no tokenizer, or does not know the border.
    """

    def __init__(self, tokenizer: str, *, border: str | None) -> None:
        self._json = tokenizer
        try:
            self._tokenizer = _tokenizers().Tokenizer.from_str(tokenizer)
        except Exception as error:  # the package raises no other class
            raise ValueError(f"expected a tokenizer of the package tokenizers in `tokenizer`, got {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._border = border
        if border is not None and self.border is None:
            raise ValueError(
                f"expected a tokenizer with the token {border!r} for several documents in `tokenizer`, got one "
                "without; a folder with a tokenizer_config.json names another one in `eos_token`"
            )

    @classmethod
    def trained(cls, documents: Sequence[str], size: int, *, border: bool) -> "BytePairs":
        """The pairs of these documents, at most ``size`` tokens with the 256 bytes and the border."""
        package = _tokenizers()
        tokenizer = package.Tokenizer(package.models.BPE())
        tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[BORDER],
            initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        return cls(tokenizer.to_str(), border=BORDER if border else None)

    @property
    @override
    def size(self) -> int:
        return int(max(self._tokenizer.get_vocab().values())) + 1

    @property
    @override
    def border(self) -> int | None:
        token: int | None = None if self._border is None else self._tokenizer.token_to_id(self._border)
        return token

    @property
    @override
    def state(self) -> dict[str, Any]:
        return {"tokenizer": self._json, "border": self._border}

    @override
    def encode(self, text: str, *, arg: str) -> Array:
        lost = next((letter for letter in sorted(set(text)) if self._loses(letter)), None)
        if lost is not None:
            raise ValueError(
                f"expected a tokenizer that knows all characters of `{arg}`, got one without {lost!r} at place "
                f"{text.index(lost)}; tokenizer 'bpe' takes any text"
            )
        return np.array(self._ids(text), dtype=np.int32)

    def _ids(self, text: str) -> list[int]:
        try:
            found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the package raises no other class
            raise ValueError(f"expected a tokenizer that takes any text in `tokenizer`, got {error}") from error
        return found

    def _loses(self, letter: str) -> bool:
        """Whether no token stands for a character; white space and control characters may go."""
        return letter.isprintable() and not letter.isspace() and not self._ids(letter)

    @property
    @override
    def unknown(self) -> int | None:
        model = json.loads(self._json)["model"]
        token: int | None = model.get("unk_id")  # of a unigram model; the others name it
        if token is None and model.get("unk_token") is not None:
            token = self._tokenizer.token_to_id(str(model["unk_token"]))
        return token

    @override
    def keeps(self, documents: Sequence[str], tokens: Array) -> bool:
        end = "" if self.border is None else "\n"
        return _bare(self.decode(tokens.tolist())) == _bare("".join(text + end for text in documents))

    @override
    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text if self._border is None else text.replace(self._border, "\n")


def _bare(text: str) -> str:
    """Without spaces at the starts of lines, which some tokenizers add to a text."""
    return re.sub("^ +", "", text, flags=re.MULTILINE)


def vocabulary_of(state: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a :attr:`Vocabulary.state`."""
    if "characters" in state:
        return Characters(**state)
    return BytePairs(**state)


def make_vocabulary(tokenizer: str, documents: Sequence[str], size: int | None) -> Vocabulary:
    """The vocabulary of training documents.

    Args:
        tokenizer: ``"characters"``, ``"bpe"``, or a JSON file of ``tokenizers`` or a folder with a ``tokenizer.json``.
        documents: To train on.
        size: Of a trained vocabulary.

    Raises:
        ImportError: If a package is not installed.
        ValueError: If there is no such tokenizer.
    """
    border = len(documents) > 1
    if tokenizer == "characters":
        return Characters("".join(set().union(*documents)), border=border)
    if tokenizer == "bpe":
        assert size is not None
        return BytePairs.trained(documents, size, border=border)
    folder = Path(tokenizer)
    path = folder / "tokenizer.json" if folder.is_dir() else folder
    if not path.is_file():
        raise ValueError(
            f"expected 'characters', 'bpe', or a file or folder of a tokenizer in `tokenizer`, got {tokenizer!r}"
        )
    return BytePairs(_read(path)[0], border=_border_of(folder) if border else None)


def _read(path: Path) -> tuple[str, Any]:
    """A JSON file: its text, and what it says."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, json.loads(text)
    except ValueError as error:
        raise ValueError(f"expected a JSON file of a tokenizer in `tokenizer`, got {str(path)!r}: {error}") from error


def _border_of(folder: Path) -> str:
    """The end of a text, as the settings of transformers beside a tokenizer name it."""
    path = folder / "tokenizer_config.json"
    settings = _read(path)[1] if path.is_file() else {}
    token = settings.get("eos_token") if isinstance(settings, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else BORDER


def _tokenizers() -> Any:
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"expected tokenizers for byte pairs, got no such package; {MISSING_EXTRA}") from error
    return tokenizers
