"""Arrays that grow on disk, row by row, and become one file at the end."""

import importlib.util
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tenzoo.atomic import atomic_write, unused

Array = npt.NDArray[Any]

LIST_ENDINGS = (".npz", ".csv", ".parquet")
"""Files that hold a list of rows."""

_BLOCK = 2**20
"""Bytes in memory at a time; of a text file, a sixteenth of it in rows."""


class GrowingArrays:
    """Named arrays to which rows are added, written as one file once they are complete.

    The rows are kept in unnamed files in the folder of the target: memory does not grow with them, and the operating
    system frees them if the process is killed. The file appears as a whole or not at all (see
    :func:`~tenzoo.atomic.atomic_write`). It replaces no other file: if there is one, a number is added to the name.

    Args:
        path: The file to write: ``.npz``, ``.csv`` or ``.parquet``. Its folder is created.

    Raises:
        ImportError: For Parquet without pyarrow.
        OSError: If the folder cannot be written to; from the methods also if the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, IO[bytes]] = {}
        self._kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self.count = 0
        """Number of rows."""
        if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ImportError("expected pyarrow to write a .parquet file, got no such package; pip install pyarrow")
        with in_folder(self._path, self.discard):
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Add the same number of rows to each array. Names, dtypes and shapes of rows are the same in every call.

        Raises:
            ValueError: If a value is not finite.
        """
        for name, array in arrays.items():
            check_finite(array, name)
            with in_folder(self._path, self.discard):
                if name not in self._rows:
                    self._rows[name] = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115  (stays open)
                    self._kinds[name] = array.dtype, array.shape[1:]
                self._rows[name].write(np.ascontiguousarray(array).data)
        self.count += len(array)

    def finish(self, columns: Mapping[str, Sequence[str]], words: Mapping[str, Sequence[str]] | None = None) -> Path:
        """Write the file.

        Args:
            columns: For each array the names of its columns in a ``.csv`` file.
            words: For arrays of integers from 0 on the word that each stands for. A ``.csv`` file has the words, a
                ``.npz`` file a further array ``{name}_names`` of them.

        Returns:
            Its path.
        """
        words = words or {}
        with in_folder(self._path, self.discard):
            path = unused(self._path)
            with atomic_write(path) as unfinished:
                if path.suffix == ".npz":
                    self._write_npz(unfinished, words)
                elif path.suffix == ".parquet":
                    self._write_parquet(unfinished, columns, words)
                else:
                    self._write_csv(unfinished, columns, words)
        self.discard()
        return path

    def discard(self) -> None:
        """Delete the rows."""
        for rows in self._rows.values():
            with suppress(OSError):  # on a full disk, where the buffer cannot be flushed
                rows.close()
        self._rows.clear()

    def _write_npz(self, path: Path, words: Mapping[str, Sequence[str]]) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, rows in self._rows.items():
                kind, shape = self._kinds[name]
                header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False}
                rows.seek(0)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, {**header, "shape": (self.count, *shape)})
                    shutil.copyfileobj(rows, file, _BLOCK)
            for name, known in words.items():
                with archive.open(f"{name}_names.npy", "w") as file:
                    np.lib.format.write_array(file, np.array(known), allow_pickle=False)

    def _write_csv(self, path: Path, columns: Mapping[str, Sequence[str]], words: Mapping[str, Sequence[str]]) -> None:
        names = [_quoted(column) for name in self._rows for column in columns[name]]
        kinds = {name: "%s" if name in words else _form(self._kinds[name][0]) for name in self._rows}
        forms = [form for name in self._rows for form in [kinds[name]] * len(columns[name])]
        written = {name: np.array([_quoted(word) for word in known]) for name, known in words.items()}
        for rows in self._rows.values():
            rows.seek(0)
        with path.open("w", encoding="utf-8") as file:
            file.write(",".join(names) + "\n")
            for start in range(0, self.count, _BLOCK // 16):
                parts = [
                    written[name][part] if name in written else part
                    for name in self._rows
                    for part in self._block(name, min(_BLOCK // 16, self.count - start))
                ]
                np.savetxt(file, np.rec.fromarrays(parts), forms, ",")  # by column: integers stay whole

    def _write_parquet(
        self, path: Path, columns: Mapping[str, Sequence[str]], words: Mapping[str, Sequence[str]]
    ) -> None:
        import pyarrow
        from pyarrow import parquet

        for rows in self._rows.values():
            rows.seek(0)
        known = {name: pyarrow.array(list(own)) for name, own in words.items()}
        writer = None
        for start in range(0, self.count, _BLOCK):
            table = {}
            for name in self._rows:
                for column, part in zip(columns[name], self._block(name, min(_BLOCK, self.count - start)), strict=True):
                    array = pyarrow.array(np.ascontiguousarray(part))
                    table[column] = pyarrow.DictionaryArray.from_arrays(array, known[name]) if name in known else array
            block = pyarrow.table(table)
            writer = parquet.ParquetWriter(path, block.schema) if writer is None else writer
            writer.write_table(block)
        if writer is not None:
            writer.close()

    def _block(self, name: str, count: int) -> Iterator[Array]:
        kind, shape = self._kinds[name]
        width = int(np.prod(shape))
        block = np.frombuffer(self._rows[name].read(count * width * kind.itemsize), kind).reshape(count, width)
        yield from block.T


def check_finite(array: Array, name: str) -> None:
    """Refuse predictions that are not finite.

    Raises:
        ValueError: If there are any.
    """
    if bad := int((~np.isfinite(array)).sum()):
        raise ValueError(
            f"expected finite predictions, got {bad} that are not among {array.size} {name}: training had diverged; "
            "give an earlier checkpoint in `ckpt_path`"
        )


@contextmanager
def in_folder(path: Path, discard: Callable[[], None]) -> Iterator[None]:
    """An error of the file system discards what there is, and names the folder.

    Raises:
        OSError: If there is one.
    """
    try:
        yield
    except OSError as error:
        discard()
        reason = os.strerror(error.errno) if error.errno else error
        raise OSError(
            f"expected a folder with room for {path.name!r} in `trainer.default_root_dir`, got {str(path.parent)!r} "
            f"({reason}); nothing was written"
        ) from error


def _quoted(word: str) -> str:
    """A cell of a ``.csv`` file (RFC 4180).

    Example:
        >>> print(_quoted("no"), _quoted("yes, sure"))
        no "yes, sure"
    """
    return '"' + word.replace('"', '""') + '"' if set(word) & set(',"\r\n') else word


def _form(kind: np.dtype[Any]) -> str:
    """A format with enough digits to read the same number again."""
    return "%d" if np.issubdtype(kind, np.integer) else "%.9g" if kind.itemsize <= 4 else "%.17g"
