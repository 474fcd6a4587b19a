"""Tokens on the disk, so that texts are tokenized once."""

import fcntl
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from tenzoo.atomic import atomic_write, remove_leftovers
from tenzoo.data.text.tokens import Tokens

_FORMAT = 2


def default_cache() -> Path:
    """The folder of caches of the user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tenzoo" / "text"


def cache_key(texts: Sequence[Sequence[str]], settings: str) -> str:
    """A checksum of texts and of all that their tokens depend on.

    Example:
        >>> cache_key([["ab", "c"]], "") == cache_key([["a", "bc"]], "")
        False
    """
    digest = hashlib.blake2b(f"{_FORMAT} {settings}".encode(), digest_size=16)
    for column in texts:
        lengths = np.array([len(column), *(len(text) for text in column)], dtype=np.int64)
        digest.update(lengths.tobytes())
        digest.update("".join(column).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def cached_tokens(folder: Path, key: str, make: Callable[[], Tokens], *, count: int, vocabulary: int) -> Tokens:
    """The tokens of an entry of the cache; they are made and written where there is none, or a damaged one.

    Of several processes one makes them, and the others wait. Where the folder cannot be written to, one line says so.

    Args:
        folder: Of the cache; it is made.
        key: Of the entry.
        make: Makes the tokens.
        count: Number of texts.
        vocabulary: More than the largest number of a token.
    """
    path = folder / f"{key}.npz"
    tokens = _read(path, key, count, vocabulary)
    if tokens is not None:
        return tokens
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with _locked(folder / f"{key}.lock"):
            tokens = _read(path, key, count, vocabulary)
            if tokens is None:
                tokens = make()
                _write(path, key, tokens)
    except OSError as error:
        rank_zero_warn(f"tokens are not kept for the next run: cannot write to `cache` ({folder}): {error.strerror}")
    return make() if tokens is None else tokens


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the processes that hold the lock; it ends with them."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        with suppress(OSError):  # a file system without locks: then each process makes the tokens
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, key: str, tokens: Tokens) -> None:
    arrays = {"ids": tokens.ids, "offsets": tokens.offsets}
    if tokens.types is not None:
        arrays["types"] = tokens.types
    with atomic_write(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, allow_pickle=False, key=np.array(key), **arrays)


def _read(path: Path, key: str, count: int, vocabulary: int) -> Tokens | None:
    """The tokens of a file; None if it is missing, damaged, or not what is asked for."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:  # it leaves open what is damaged
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, RuntimeError):
        return None
    types = {"ids": np.int32, "offsets": np.int64, "types": np.uint8}
    if str(arrays.pop("key", None)) != key or not {"ids", "offsets"} <= arrays.keys() <= types.keys():
        return None
    if any(array.ndim != 1 or array.dtype != types[name] for name, array in arrays.items()):
        return None
    tokens = Tokens(**arrays)
    offsets = tokens.offsets
    whole = len(offsets) == count + 1 and offsets[0] == 0 and offsets[-1] == len(tokens.ids)
    whole = whole and (tokens.types is None or len(tokens.types) == len(tokens.ids))
    if not whole or (tokens.lengths < 0).any():
        return None
    in_vocabulary = len(tokens.ids) == 0 or (tokens.ids.min() >= 0 and tokens.ids.max() < vocabulary)
    return tokens if in_vocabulary else None
