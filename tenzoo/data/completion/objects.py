"""Data in memory: arrays, tensors, data frames, and arrays with coordinates. Files of them are read as them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenzoo.data.arrays import Array, ContentError, check_room
from tenzoo.data.checks import MISSING_ARRAYS
from tenzoo.data.completion.ambiguity import check_dense
from tenzoo.data.completion.entries import Entries, dense_entries, sparse_entries
from tenzoo.data.completion.labels import Label, labels_of
from tenzoo.data.completion.missing_values import check_markers, without_markers


def is_frame(data: object) -> bool:
    """Whether data has named columns: of pandas, polars or pyarrow."""
    return not isinstance(data, str | torch.Tensor | np.ndarray) and (
        hasattr(data, "column_names") or (hasattr(data, "columns") and hasattr(data, "__getitem__"))
    )


def columns_of(data: Any) -> dict[str, Array]:
    """The columns of a data frame, by name."""
    if hasattr(data, "column_names"):
        return {str(name): column.to_numpy() for name, column in zip(data.column_names, data.columns, strict=True)}
    return {str(name): np.asarray(data[name]) for name in data.columns}


def check_object(data: object, *, arg: str = "dataset") -> None:
    """Refuse what is neither a name, a path, nor data.

    Raises:
        TypeError: If it is none of these.

    Example:
        >>> check_object(np.ones((2, 2)))
    """
    if isinstance(data, str | torch.Tensor | np.ndarray) or is_frame(data):
        return
    if _has_coordinates(data) or hasattr(data, "data_vars") or _is_scipy_sparse(data):
        return
    raise TypeError(
        f"expected a name, a path, an array of NumPy, torch or xarray, or a data frame in `{arg}`, got a "
        f"{type(data).__name__}"
    )


def object_entries(
    data: Any, *, missing_values: Sequence[float] = (), arg: str = "dataset"
) -> tuple[Entries, tuple[int, ...]]:
    """The known entries of an array in memory, and its shape.

    A dense array has NaN for missing entries, or a mask (``numpy.ma``); what a sparse one does not hold is missing, and
    not 0. The dimensions of an ``xarray.DataArray`` are the names of the modes, and its coordinates their labels.

    Args:
        data: An array of NumPy, a tensor of torch (dense or sparse), a sparse matrix of SciPy, or a ``DataArray``.
        missing_values: Numbers that mean a missing value.
        arg: Name of the argument, for the errors.

    Raises:
        ValueError: If the data is ambiguous or not valid.

    Example:
        >>> entries, shape = object_entries(np.ma.masked_equal([[1.5, -1.0], [0.5, 2.0]], -1.0))
        >>> entries.index.tolist(), shape
        ([[0, 0], [1, 0], [1, 1]], (2, 2))
    """
    if isinstance(data, torch.Tensor):
        return _of_tensor(data, missing_values, arg)
    if _is_scipy_sparse(data):
        found = data.tocoo()
        if not found.has_canonical_format and (found := data.tocsr().tocoo()).nnz < data.nnz:
            raise ValueError(f"expected each cell once in `{arg}`, got a sparse matrix in which some occur twice")
        return _sparse(np.stack([found.row, found.col], axis=1), found.data, found.shape, missing_values, arg)
    if hasattr(data, "data_vars"):
        data = _only(dict(data.data_vars), "variable", arg)
    if _has_coordinates(data):
        entries, shape = _dense(np.asarray(data.values), missing_values, arg)
        return replace(entries, mode_names=tuple(map(str, data.dims)), labels=_labels(data, arg)), shape
    if isinstance(data, np.ma.MaskedArray):
        kind = data.dtype if data.dtype.kind == "f" else np.dtype(np.float64)
        data = np.where(np.ma.getmaskarray(data), np.asarray(np.nan, dtype=kind), np.asarray(data, dtype=kind))
    return _dense(np.asarray(data), missing_values, arg)


def read_mat(path: Path) -> Any:
    """The array of a ``.mat`` file of MATLAB, dense or sparse.

    Raises:
        TooLargeError: If it does not fit into memory.
        ValueError: If there is not one array of numbers.
    """
    from scipy import io  # type: ignore[import-untyped]

    with path.open("rb") as file:
        header = file.read(19)
    if header == b"MATLAB 7.3 MAT-file":
        raise ContentError(
            f"expected a file of MATLAB 7 or older in `dataset`, got {str(path)!r} of 7.3; save it with -v7"
        )
    for _, shape, _ in io.whosmat(str(path)):
        check_room(shape, 8)
    found = io.loadmat(str(path))
    return _only({name: each for name, each in found.items() if not name.startswith("__")}, "array", "dataset")


def read_netcdf(path: Path) -> Any:
    """The variable of a netCDF file, with its coordinates.

    Raises:
        ImportError: If xarray is not installed.
        TooLargeError: If it does not fit into memory.
        ValueError: If there is not one variable of two or more dimensions.
    """
    try:
        import xarray
    except ImportError as error:
        raise ImportError(
            f"expected xarray to read {str(path)!r} in `dataset`, got no such package; {MISSING_ARRAYS}"
        ) from error
    with xarray.open_dataset(path) as file:
        found = {str(name): each for name, each in file.data_vars.items() if each.ndim >= 2}
        variable = _only(found, "variable of two or more dimensions", "dataset")
        check_room(variable.shape, variable.dtype.itemsize)
        return variable.load()


def _only(found: Mapping[str, Any], what: str, arg: str) -> Any:
    if len(found) != 1:
        raise ContentError(f"expected one {what} in `{arg}`, got {', '.join(map(str, found)) or 'none'}; give it alone")
    return next(iter(found.values()))


def _has_coordinates(data: object) -> bool:
    return all(hasattr(data, name) for name in ("dims", "coords", "values"))


def _is_scipy_sparse(data: object) -> bool:
    return hasattr(data, "tocoo") and hasattr(data, "nnz") and getattr(data, "ndim", 0) == 2


def _labels(data: Any, arg: str) -> tuple[tuple[Label, ...], ...] | None:
    """Those of the coordinates; numbers from 0 on for a dimension without."""
    if not any(name in data.coords for name in data.dims):
        return None
    labels = []
    for name, size in zip(data.dims, data.shape, strict=True):
        own = labels_of(np.asarray(data.coords[name].values)) if name in data.coords else list(range(size))
        if len(set(own)) < len(own):
            raise ValueError(f"expected different coordinates along {str(name)!r} in `{arg}`, got some of them twice")
        labels.append(tuple(own))
    return tuple(labels)


def _of_tensor(data: torch.Tensor, missing: Sequence[float], arg: str) -> tuple[Entries, tuple[int, ...]]:
    if data.layout in (torch.sparse_csr, torch.sparse_csc):
        data = data.to_sparse(layout=torch.sparse_coo)
    if data.layout == torch.sparse_coo:
        if data.dense_dim():
            raise ValueError(f"expected a number for each index in `{arg}`, got {data.dense_dim()} dense dimensions")
        if not data.is_coalesced():
            number = data._nnz()
            data = data.coalesce()
            if data._nnz() < number:
                raise ValueError(f"expected each cell once in `{arg}`, got a sparse tensor in which some occur twice")
        return _sparse(data.indices().t().cpu().numpy(), _tensor_values(data.values(), arg), data.shape, missing, arg)
    return _dense(_tensor_values(data, arg), missing, arg)


def _tensor_values(data: torch.Tensor, arg: str) -> Array:
    """The numbers of a dense tensor.

    Raises:
        ValueError: If it is not one, or does not hold real numbers.
    """
    if data.layout != torch.strided or data.is_meta:
        raise ValueError(
            f"expected a tensor with numbers, dense or sparse_coo, in `{arg}`, got {data.layout} on {data.device}"
        )
    if data.is_complex() or data.dtype == torch.bool:
        raise ValueError(f"expected real numbers in `{arg}`, got {data.dtype}; convert the values to float32")
    if data.is_quantized:
        raise ValueError(f"expected plain numbers in `{arg}`, got quantized ones; save tensor.dequantize()")
    if data.numel() > data.untyped_storage().nbytes() // data.element_size():
        raise ValueError(
            f"expected a value of its own for each cell in `{arg}`, got {tuple(data.shape)} cells that share some; "
            "save tensor.contiguous()"
        )
    values = data.detach().cpu().resolve_neg()
    if values.is_floating_point() and values.dtype != torch.float64:
        values = values.float()  # numpy has neither bfloat16 nor float8
    return np.asarray(values.numpy())


def _dense(values: Array, missing: Sequence[float], arg: str) -> tuple[Entries, tuple[int, ...]]:
    values = without_markers(values, missing)
    check_dense(values, arg=arg)
    return dense_entries(values, arg=arg)


def _sparse(
    index: Array, values: Array, shape: Sequence[int], missing: Sequence[float], arg: str
) -> tuple[Entries, tuple[int, ...]]:
    values = without_markers(np.asarray(values), missing)
    check_markers(values, arg=arg)
    return sparse_entries(index.astype(np.int64), values, [int(size) for size in shape], arg=arg)
