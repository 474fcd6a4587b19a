"""State dicts: how two of them differ, which numbers a network cannot take, and which tensors share memory."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

K = TypeVar("K")

FORMER_NAME, NAME = "weight.cores.", "factorization.cores."
"""Of the cores of a layer in a state dict, before version 0.2 and now."""


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


def with_current_names(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with today's names of cores: files from before version 0.2 have the former ones.

    Args:
        weights: As read.
        own: The state dict of the network.

    Example:
        >>> core = torch.ones(2)
        >>> list(with_current_names({"0.weight.cores.0": core}, {"0.factorization.cores.0": core}))
        ['0.factorization.cores.0']
    """
    current = {name: name.replace(FORMER_NAME, NAME) for name in weights}
    return {current[name] if name not in own and current[name] in own else name: weights[name] for name in weights}


def lost_values(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """Names whose numbers a network cannot take from a state dict, with what is valid and what is given.

    Numbers are lost beyond the range of a type, and where two names share memory. NaN is never valid. Infinity is valid
    in buffers only, such as masks.

    Args:
        model: A network with the shapes and kinds of numbers of the state dict.
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
    """Whether two tensors that share memory can take two values at once; True for tensors of two types."""
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
    """Where tensors lie in memory; finds tensors that share numbers, such as views of one storage.

    Args:
        tensors: Pairs of a key and a tensor.

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
        """Keys of the tensors whose range in memory overlaps the range of this tensor, in the given order."""
        memory, start, end = _span(tensor)
        return [key for first, last, key in self._spans.get(memory, []) if first < end and start < last]


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """The storage of a tensor, and the start and the end of the tensor in it, in bytes; also on the meta device."""
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
    """Names whose shapes differ between two state dicts, with both shapes; None where a name is missing.

    Example:
        >>> list(shape_differences({"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2), "b": torch.ones(4)}))
        [('b', (3,), (4,))]
    """
    for name in dict.fromkeys([*own, *other]):
        first, second = (tuple(state[name].shape) if name in state else None for state in (own, other))
        if first != second:
            yield name, first, second


def kind_differences(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """Names whose kinds of numbers differ between two state dicts, such as floats and integers, with both kinds.

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
