"""Files of trained weights: read without running code from them, and matched with a network by name and shape."""

import mmap
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

M = TypeVar("M", bound=nn.Module)
K = TypeVar("K")

_PREFIXES = ("", "module.", "network.", "model.", "_orig_mod.")
"""What DataParallel, tasks of Lightning and ``torch.compile`` put before the names of a network's weights."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    A ``.safetensors`` file; or a file of ``torch.save``, which holds a state dict, or a dictionary with one under
    ``"state_dict"``, such as a checkpoint of Lightning. No code is run from it.

    Args:
        path: Of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of these.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected an existing file of weights, got {str(path)!r}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = load_torch(path, "a file of weights that torch can load without running code")
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"expected a dictionary with a `state_dict` of tensors in {str(path)!r}, got something else")
    for name, value in weights.items():
        if value.is_meta:
            raise ValueError(f"expected numbers of {str(name)!r} in {str(path)!r}, got a tensor on the meta device")
    return {str(name): value for name, value in weights.items()}


class OversizedError(ValueError):
    """A file asks for more memory than it is long."""


def load_torch(path: Path, what: str) -> Any:
    """Load a file of ``torch.save`` without running code from it, and into no more memory than the file is long.

    Args:
        path: Of the file.
        what: Is expected, for the errors.

    Raises:
        ValueError: If the file is damaged, or would run code.
        OversizedError: If it asks for more memory than it is long: by compression, by records that overlap, by buffers
            that it only names, or by tensors that repeat what they hold.
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
    """Refuse what would take memory while it is loaded."""
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
            f"expected {what}, got {str(path)!r} of {length:,} bytes that asks for {size:,} of memory; write it again"
        )


def _tensors(content: object) -> Iterator[Tensor]:
    """All strided tensors in memory, each once, however often the containers around it are repeated."""
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

    Names may begin with what wrappers put before them (``"module."``, ``"network."``, ``"model."``). Missing counts of
    batches, as in files of old versions of torch, are left alone.

    Args:
        model: Its state dict has to have the names and shapes of the file.
        path: As :func:`read_weights` takes it.

    Returns:
        The model itself.

    Raises:
        FileNotFoundError: As :func:`read_weights`.
        ValueError: As :func:`read_weights`, or if a name, a shape or the kind of numbers differs; the model then stays
            as it is.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.pt"
        >>> torch.save({"state_dict": {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}}, path)
        >>> load_weights_(nn.Linear(2, 1), path).weight.tolist()
        [[1.0, 1.0]]
    """
    own = model.state_dict()
    weights = _without_prefix(read_weights(path), own, Path(path))
    for name, mine, other in shape_differences(own, weights):
        if other is not None or not name.endswith("num_batches_tracked"):
            raise ValueError(
                f"expected the weights of this {type(model).__name__} in {str(path)!r}, got {name!r} "
                f"of {_described(other)} where the network has {_described(mine)}"
            )
    for name, kind, given in kind_differences(own, weights):
        raise ValueError(f"expected {name!r} as {kind} in {str(path)!r}, got {given}")
    for name, value in weights.items():
        to = own[name].dtype
        narrower = value.is_floating_point() and torch.finfo(value.dtype).max > torch.finfo(to).max
        if narrower and bool((value.to(to).isinf() & value.isfinite()).any()):
            raise ValueError(f"expected numbers within the range of {to} as {name!r} in {str(path)!r}, got larger ones")
    model.load_state_dict(weights, strict=False)
    return model


class Places(Generic[K]):
    """Where in memory tensors are, so that those are found that show the same numbers in whatever form.

    Args:
        tensors: With a key each.

    Example:
        >>> both, other = torch.ones(4, 2), torch.ones(2)
        >>> Places([("first", both[:2]), ("last", both[2:]), ("other", other)]).of(both.t()[1])
        ['first', 'last']
    """

    def __init__(self, tensors: Iterable[tuple[K, Tensor]]) -> None:
        self._spans: dict[int, list[tuple[int, int, K]]] = {}
        for key, tensor in tensors:
            memory, start, end = _span(tensor)
            self._spans.setdefault(memory, []).append((start, end, key))

    def of(self, tensor: Tensor) -> list[K]:
        """Keys of the tensors from whose first number to whose last one there is one of this tensor, in their order."""
        memory, start, end = _span(tensor)
        return [key for first, last, key in self._spans.get(memory, []) if first < end and start < last]


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """The memory that a tensor is in, also one on the meta device, and from where to where in it, in bytes."""
    if is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_nested or not tensor.numel():
        return id(tensor), 0, 1
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.itemsize
    storage = tensor.untyped_storage()
    try:
        memory = storage.data_ptr() or storage._cdata
    except RuntimeError:  # of a fake tensor
        memory = storage._cdata
    return memory, start, start + length * tensor.itemsize


def shape_differences(
    own: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[int, ...] | None, tuple[int, ...] | None]]:
    """Names that two state dicts do not both have with the same shape, and both shapes; None where a name is missing.

    Example:
        >>> list(shape_differences({"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2), "b": torch.ones(4)}))
        [('b', (3,), (4,))]
    """
    for name in dict.fromkeys([*own, *other]):
        first, second = (tuple(state[name].shape) if name in state else None for state in (own, other))
        if first != second:
            yield name, first, second


def kind_differences(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """Names in both of two state dicts that are not numbers of one kind, such as floats and integers, with both kinds.

    Example:
        >>> list(kind_differences({"a": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.int64)}))
        [('a', 'torch.float32', 'torch.int64')]
    """
    for name, value in own.items():
        kind = other.get(name, value)
        if kind.is_floating_point() != value.is_floating_point():
            yield name, str(value.dtype), str(kind.dtype)
        elif kind.layout != value.layout:
            yield name, str(value.layout), str(kind.layout)


def _described(shape: tuple[int, ...] | None) -> str:
    return "no shape" if shape is None else f"shape {shape}"


def _without_prefix(weights: Mapping[str, Tensor], own: Mapping[str, object], path: Path) -> dict[str, Tensor]:
    """The weights under the prefix that leaves most names of the network; names without it are not the network's."""
    stripped = [
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
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
