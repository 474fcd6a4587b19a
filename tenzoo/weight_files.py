"""Files of trained weights: read without running code from them, and matched with a network by name and shape."""

import mmap
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tenzoo.state_dicts import kind_differences, lost_values, shape_differences, tensors_of, with_current_names

M = TypeVar("M", bound=nn.Module)

_PREFIXES = ("", "module.", "network.", "model.", "_orig_mod.")
"""Prefixes that DataParallel, tasks of Lightning and ``torch.compile`` add to the names of a network's weights."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    The file is a ``.safetensors`` file, or a file of ``torch.save`` with a state dict, or with a dictionary that has
    one under ``"state_dict"``, such as a checkpoint of Lightning. No code is run from it.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected an existing file of weights, got {str(path)!r}")
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    return weights_of(load_torch(path, "a file of weights that torch can load without running code"), path)


def weights_of(content: object, path: Path) -> dict[str, Tensor]:
    """The tensors of what was loaded from a file: a state dict, or a dictionary that has one under ``"state_dict"``.

    Raises:
        ValueError: If it is something else.
    """
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"expected a dictionary with a `state_dict` of tensors in {str(path)!r}, got something else")
    for name, value in weights.items():
        if value.is_meta:
            raise ValueError(f"expected numbers of {str(name)!r} in {str(path)!r}, got a tensor on the meta device")
    return {str(name): value for name, value in weights.items()}


class OversizedError(ValueError):
    """A file would take more memory than its own size."""


def load_torch(path: Path, what: str) -> Any:
    """Load a file of ``torch.save`` without running code from it, and into no more memory than the file's size.

    Args:
        path: The file.
        what: What the file should be, for the errors.

    Raises:
        ValueError: If the file is damaged, or would run code.
        OversizedError: If it would take more memory than its own size: by compression, by overlapping records, by
            buffers that it only names, or by tensors that repeat their numbers.
    """
    _check_archive(path, what)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every kind of damage raises its own
        raise ValueError(
            f"expected {what}, got {str(path)!r}, which is damaged, or is none, or would run code if it were loaded; "
            "none was run"
        ) from error
    tensors = list(_tensors(content))
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    for size in (sum(held.values()), *(value.numel() * value.element_size() for value in tensors)):
        _check_size(path, what, size)
    return content


def _check_archive(path: Path, what: str) -> None:
    """Refuse a file that would take too much memory while it is loaded."""
    if path.stat().st_size == 0:
        raise ValueError(f"expected {what}, got the empty {str(path)!r}")
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                _check_size(path, what, sum(record.file_size for record in archive.infolist()))
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"expected {what}, got {str(path)!r}, which is damaged: {error}") from error
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"bytearray") >= 0:  # torch would make one of any length, as the only such type
            raise ValueError(f"expected {what}, got {str(path)!r} with a bytearray, which torch.save does not need")


def _check_size(path: Path, what: str, size: int) -> None:
    length = path.stat().st_size
    if size > length:
        raise OversizedError(
            f"expected {what}, got {str(path)!r} of {length:,} bytes that asks for {size:,} of memory; it is damaged"
        )


def _tensors(content: object) -> Iterator[Tensor]:
    """All strided tensors with memory, each once, even where containers repeat."""
    pending, seen = [content], set[int]()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.layout == torch.strided and not value.is_meta:
                yield value
        elif isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list | tuple | set):
            pending += value


def load_weights_(model: M, path: str | Path) -> M:
    """Load a file of weights into a network, in place.

    Names may begin with the prefix of a wrapper (``"module."``, ``"network."``, ``"model."``). Counts of batches may be
    missing, as in files of old versions of torch; those of the network then stay as they are.

    Args:
        model: A network whose state dict has the names and shapes of the file.
        path: As in :func:`read_weights`.

    Returns:
        The model itself.

    Raises:
        FileNotFoundError: As :func:`read_weights`.
        ValueError: As :func:`read_weights`. If a name, a shape or the kind of numbers differs, or if numbers are not
            finite or would be lost (see :func:`~tenzoo.state_dicts.lost_values`); the model then stays as it is. If the
            model has no memory or no shapes yet, or a state that is no tensor.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.pt"
        >>> torch.save({"state_dict": {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}}, path)
        >>> load_weights_(nn.Linear(2, 1), path).weight.tolist()
        [[1.0, 1.0]]
    """
    own = tensors_of(model)
    for name, value in own.items():
        if value.is_meta:
            raise ValueError(f"expected a network with memory in `model`, got {name!r} on the meta device")
    weights = _without_prefix(read_weights(path), own, Path(path))
    for name, mine, other in shape_differences(own, weights):
        if other is not None or not name.endswith("num_batches_tracked"):
            raise ValueError(
                f"expected the weights of this {type(model).__name__} in {str(path)!r}, got {name!r} "
                f"of {_described(other)} where the network has {_described(mine)}"
            )
    for name, kind, given in kind_differences(own, weights):
        raise ValueError(f"expected {name!r} as {kind} in {str(path)!r}, got {given}")
    for name, valid, given in lost_values(model, weights):
        raise ValueError(f"expected {valid} as {name!r} in {str(path)!r}, got {given}")
    model.load_state_dict(weights, strict=False)
    return model


def _described(shape: tuple[int, ...] | None) -> str:
    return "no shape" if shape is None else f"shape {shape}"


def _without_prefix(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights under the prefix with which most names are the network's."""
    stripped = [
        with_current_names(
            {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, own
        )
        for prefix in _PREFIXES
    ]
    complete = [prefix for prefix, found in zip(_PREFIXES, stripped, strict=True) if found.keys() >= own.keys()]
    if own and len(complete) > 1:
        raise ValueError(
            f"expected the weights of one network in {str(path)!r}, got those of several, one of them under "
            f"{complete[1]!r}; write a file of the wanted ones"
        )
    return max(stripped, key=lambda found: len(found.keys() & own.keys()))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError  # only here: it is compiled, and all else does without
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file, got {str(path)!r}, which is none or is damaged") from error
    return tensors
