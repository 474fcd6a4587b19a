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
    if path.suffix.lower() == ".safetensors":
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
        ValueError: As :func:`read_weights`, or if a name, a shape or the kind of numbers differs, or if numbers are not
            finite or would not survive (see :func:`lost_values`); the model then stays as it is. If the model has no
            memory or shapes yet, or a state that is no tensor.

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


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network.

    Raises:
        ValueError: If anything in it is no tensor, or has no shape yet.
    """
    own: dict[str, Tensor] = model.state_dict()
    for name, value in own.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"expected a network whose state is tensors in `model`, got a {type(value).__name__} as {name!r}"
            )
        if is_lazy(value):
            raise ValueError(f"expected shapes in `model`, got {name!r}, which has none yet; run the model once")
    return own


def lost_values(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """Names under which a network would not have the numbers of a state dict, what is valid, and what is given.

    Numbers are lost beyond the range of a type, and where two names are one memory. NaN is valid nowhere, and infinity
    in buffers alone, as in masks.

    Args:
        model: Shapes and kinds are those of the state dict.
        weights: A state dict, or a part of one.

    Example:
        >>> list(lost_values(nn.Linear(1, 1).half(), {"bias": torch.tensor([1e6])}))
        [('bias', 'numbers within the range of torch.float16', '1000000.0')]
    """
    own = tensors_of(model)
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    places = Places(own.items())
    for name, value in weights.items():
        if name not in own:
            continue
        check = _lost_float if value.is_floating_point() or value.is_complex() else _lost_integer
        if lost := check(value, own[name].dtype, name in trained):
            yield name, *lost
        for other in places.of(own[name]):
            if other == name:
                break  # of two names the later one
            if other in weights and not _agree((own[other], own[name]), (weights[other], value)):
                yield name, f"the numbers of {other!r}, which is in the same memory,", "others"


def _lost_float(value: Tensor, to: torch.dtype, trained: bool) -> tuple[str, str] | None:
    numbers = _comparable(value)
    invalid = ~numbers.isfinite() if trained else numbers.isnan()
    if bool(invalid.any()):
        return "finite numbers" if trained else "numbers", str(numbers[invalid][0].item())
    beyond = numbers[numbers.isfinite() & (numbers.abs() > torch.finfo(to).max)]
    return (f"numbers within the range of {to}", str(beyond[0].item())) if len(beyond) else None


def _lost_integer(value: Tensor, to: torch.dtype, trained: bool) -> tuple[str, str] | None:
    if value.dtype == to or not value.numel():
        return None
    least, most = (0, 1) if to == torch.bool else (torch.iinfo(to).min, torch.iinfo(to).max)
    numbers = value.cpu().numpy()  # torch does not compare unsigned ones
    beyond = [number for number in (int(numbers.min()), int(numbers.max())) if not least <= number <= most]
    return (f"numbers within the range of {to}", str(beyond[0])) if beyond else None


def _comparable(value: Tensor) -> Tensor:
    """The numbers of a tensor in a type that torch compares: float8 as float32, complex ones as pairs."""
    value = value if value.layout == torch.strided else value.to_dense()
    if value.is_complex():
        return torch.view_as_real(value.resolve_conj())
    return value.float() if value.is_floating_point() and value.itemsize == 1 else value


def _agree(own: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor]) -> bool:
    """Whether two tensors that share memory can take two values at once; as far as they are of one type."""
    if own[0].dtype != own[1].dtype:
        return True
    start = min(int(tensor.storage_offset()) for tensor in own)
    size = max(end for _, _, end in map(_span, own)) // own[0].itemsize - start
    memory = given[0].new_zeros(size, dtype=own[0].dtype)
    first, last = (memory.as_strided(t.shape, t.stride(), int(t.storage_offset()) - start) for t in own)
    first.copy_(given[0])
    last.copy_(given[1])
    return _comparable(first).equal(_comparable(given[0].to(memory)))


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
        if _kind(kind) != _kind(value):
            yield name, str(value.dtype), str(kind.dtype)
        elif kind.layout != value.layout:
            yield name, str(value.layout), str(kind.layout)


def _kind(value: Tensor) -> tuple[bool, bool, bool]:
    return value.is_floating_point(), value.is_complex(), value.is_quantized


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
