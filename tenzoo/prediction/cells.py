"""A whole tensor that is filled on disk, cell by cell, and becomes one file at the end."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenzoo.atomic import atomic_write, unused
from tenzoo.data.checks import MISSING_ARRAYS
from tenzoo.memory import free_memory, in_gigabytes
from tenzoo.prediction.arrays import Array, check_finite, in_folder

DENSE_ENDINGS = (".npy", ".pt", ".mat", ".nc")
"""Files that hold a whole tensor."""

_IN_MEMORY = (".pt", ".mat", ".nc")
"""Files whose writers take an array in memory, and copy it."""


class GrowingCells:
    """The cells of a completed tensor, written as one file once all are there; float32.

    They are kept in an unnamed file in the folder of the target, which the operating system frees if the process is
    killed. The file appears as a whole or not at all, and replaces no other file: if there is one, a number is added to
    the name.

    Args:
        path: The file to write: ``.npy``, ``.pt``, ``.mat`` (an array ``completed``) or ``.nc`` (netCDF). Its folder is
            created.
        data: A data module with ``shape``, ``known`` entries, and perhaps ``mode_names`` and ``labels``.

    Raises:
        TypeError: If the data is another.
        ValueError: If not all missing cells are predicted, or the tensor does not fit into memory or its file format.
        OSError: If the folder cannot be written to; from the methods also if the disk is full.
    """

    def __init__(self, path: Path, data: Any) -> None:
        if not hasattr(data, "known") or not hasattr(data, "shape"):
            raise TypeError(f"expected a CompletionDataModule for a {path.suffix} file, got {type(data).__name__}")
        if data.hparams.predict_index is not None:
            raise ValueError(
                f"expected no `predict_index` for a {path.suffix} file, which holds the whole tensor, got "
                f"{data.hparams.predict_index!r}; leave it out, or write a .csv, .npz or .parquet file"
            )
        self._path, self._data, self._shape = path, data, tuple(data.shape)
        self.count = 0
        """Number of cells that were added."""
        size, free = 4 * math.prod(self._shape), free_memory()
        if path.suffix in _IN_MEMORY and free is not None and 2 * size > free:
            raise ValueError(
                f"expected a tensor that fits into memory twice for a {path.suffix} file, got {in_gigabytes(size)} "
                f"where {in_gigabytes(free)} are free; write a .npy file"
            )
        with in_folder(path, self.discard):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  (stays open)
            self._cells = np.memmap(self._file, np.float32, "w+", shape=(math.prod(self._shape),))

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Set the ``values`` (n,) at ``indices`` (n, order).

        Raises:
            ValueError: If a value is not finite.
        """
        check_finite(arrays["values"], "values")
        self._set(arrays["indices"], arrays["values"])
        self.count += len(arrays["values"])

    def _set(self, index: Array, values: Array) -> None:
        self._cells[np.ravel_multi_index(tuple(index.T), self._shape)] = values

    def finish(self, columns: Mapping[str, Sequence[str]], words: Mapping[str, Sequence[str]] | None = None) -> Path:
        """Write the file, with the known values as they are; its path."""
        known = self._data.known
        self._set(known.index.numpy(), known.value.numpy())
        with in_folder(self._path, self.discard):
            path = unused(self._path)
            with atomic_write(path) as unfinished:
                self._write(unfinished, self._cells.reshape(self._shape))
        self.discard()
        return path

    def discard(self) -> None:
        """Delete the cells."""
        self.__dict__.pop("_cells", None)
        if "_file" in self.__dict__:
            self._file.close()

    def _write(self, path: Path, values: Array) -> None:
        match self._path.suffix:
            case ".npy":
                with path.open("wb") as file:
                    np.lib.format.write_array(file, values, allow_pickle=False)
            case ".pt":
                torch.save(torch.from_numpy(np.array(values)), path)
            case ".mat":
                from scipy import io  # type: ignore[import-untyped]

                with path.open("wb") as file:
                    io.savemat(file, {"completed": np.asarray(values)})
            case _:
                self._write_netcdf(path, values)

    def _write_netcdf(self, path: Path, values: Array) -> None:
        try:
            import xarray
        except ImportError as error:
            raise ImportError(f"expected xarray to write a .nc file, got no such package; {MISSING_ARRAYS}") from error
        names, labels = self._data.mode_names, self._data.labels
        names = names or [f"i{mode}" for mode in range(len(self._shape))]
        coords = {} if labels is None else {name: list(own) for name, own in zip(names, labels, strict=True)}
        array = xarray.DataArray(np.asarray(values), coords, names, "completed")
        path.write_bytes(array.to_netcdf(engine="h5netcdf"))  # HDF5 would lock the file, which is open
