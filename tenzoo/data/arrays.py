"""Safe reading of NumPy's files: without pickles, and within the size of the file and the free memory."""

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tenzoo.memory import free_memory, in_gigabytes

Array = npt.NDArray[Any]

_MAX_INFLATION = 100
"""An archive may hold this many times its own size, and _MAX_INFLATED bytes in any case."""
_MAX_INFLATED = 2**28


class TooLargeError(Exception):
    """A file needs too much memory. The message says what it holds and what to do."""


class ContentError(ValueError):
    """A file holds something else than it should. The message is for the user as it is."""


def read_npy(path: Path) -> Array:
    """The array of a ``.npy`` file.

    Raises:
        TooLargeError: If it does not fit into memory.
        ValueError: And others, of NumPy, if it is not such a file, holds objects, or its header states another size.
    """
    with path.open("rb") as file:
        return _read_array(file, path.stat().st_size)


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of a ``.npz`` file, by name.

    Raises:
        TooLargeError: If they do not fit into memory, or the file unpacks to far more than its size.
        ValueError: And others, of NumPy and zipfile, if it is not such a file, or holds objects.
    """
    arrays: dict[str, Array] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        check_inflation(archive, path.stat().st_size)
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two arrays with one name")
        for member in members:
            with archive.open(member) as file:
                arrays[member.filename.removesuffix(".npy")] = _read_array(file, member.file_size)
    return arrays


def check_inflation(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive that unpacks to far more than its size in bytes.

    Raises:
        TooLargeError: If it does.
    """
    inflated = sum(member.file_size for member in archive.infolist())
    if inflated > max(_MAX_INFLATED, _MAX_INFLATION * size):
        raise TooLargeError(f"{size} bytes that hold {in_gigabytes(inflated)}; write it again without compression")


def _read_array(file: IO[bytes], size: int) -> Array:
    """An array that fills a file of this size exactly; the header alone is not believed."""
    version = np.lib.format.read_magic(file)
    header: Any = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
        (3, 0): np.lib.format.read_array_header_2_0,  # differs only in the encoding of field names
    }[version]
    shape, _, kind = header(file)
    expected = math.prod(shape) * kind.itemsize
    if kind.hasobject or file.tell() + expected != size:
        raise ValueError("objects, or another size than the header says")
    check_room(shape, kind.itemsize)
    file.seek(0, os.SEEK_SET)
    return np.lib.format.read_array(file, allow_pickle=False)


def check_room(shape: Sequence[int], itemsize: int) -> None:
    """Refuse a dense array that does not fit into memory, together with its copy in float32.

    Raises:
        TooLargeError: If it does not.
    """
    expected, free = math.prod(shape) * itemsize, free_memory()
    if free is not None and 2 * expected > free:
        raise TooLargeError(
            f"an array {tuple(shape)} of {in_gigabytes(expected)} where {in_gigabytes(free)} are free; write the known "
            "entries alone, as `indices` and `values` in an .npz file"
        )
