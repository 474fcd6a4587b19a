"""Hashes that tell inputs, and models, from others."""

import hashlib
from collections.abc import Iterator, Sequence
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call, said
from tenzoo.compression.replaceable import named_modules


def fingerprint(calls: Sequence[Call]) -> str:
    """A hash of the shapes, dtypes and numbers of all inputs, on any device, and of all else in them.

    Raises:
        ValueError: If a value has no parts that could be hashed.

    Example:
        >>> one, other = Call((torch.ones(2),), {}), Call((torch.ones(2, 1),), {})
        >>> fingerprint([one]) == fingerprint([one]), fingerprint([one]) == fingerprint([other])
        (True, False)
    """
    digest = hashlib.sha256()
    for call in calls:
        try:
            for value in (*call.args, *(part for named in sorted(call.kwargs.items()) for part in named)):
                for content in _content(value, ()):
                    digest.update(content)
        except Exception as error:
            raise ValueError(
                f"expected inputs that can be told apart in `calibration`, got {call}: {said(error)}"
            ) from error
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the classes of a model's modules, and of the numbers of its parameters and buffers.

    Tensors that are not dense, or of a class of their own, count with their identity and their version.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> before = model_fingerprint(model)
        >>> _ = nn.init.zeros_(model.bias)
        >>> model_fingerprint(model) == before
        False
    """
    digest = hashlib.sha256()
    for name, module in named_modules(model):
        if "_orig_mod" in module._modules:  # of torch.compile, which changes no numbers
            continue
        digest.update(f"{name} {type(module).__module__}.{type(module).__qualname__} ".encode())
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            digest.update(f"{key} {type(value).__qualname__} ".encode())
            if value is None:
                continue
            if type(value) in (Tensor, nn.Parameter) and _is_dense(value):
                for content in _content(value, ()):
                    digest.update(content)
            else:
                digest.update(f"{id(value)} {None if value.is_inference() else value._version} ".encode())
    return digest.hexdigest()


def _is_dense(value: Tensor) -> bool:
    return value.layout is torch.strided and not (value.is_meta or value.is_nested or value.is_quantized)


def _content(value: Any, around: tuple[int, ...]) -> Iterator[bytes | memoryview]:
    """What distinguishes a value of any class from others: the parts that a copy of it would be made of."""
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
        yield f"{tuple(value.shape)} {value.dtype} ".encode()
        yield _memory(value)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.shape} {value.dtype} ".encode()
        yield value.tobytes()
    elif isinstance(value, str | int | float | complex | bytes | NoneType | torch.layout):
        yield f"{value!r} ".encode()
    elif isinstance(value, type | FunctionType | BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__} ".encode()
    elif id(value) in around:
        yield b"itself "
    elif isinstance(value, set | frozenset):
        yield b"set "
        yield from sorted(b"".join(_content(each, (*around, id(value)))) for each in value)
    else:
        parts = value if type(value) in (list, tuple) else list(value.items()) if type(value) is dict else _parts(value)
        yield f"{type(value).__name__} {len(parts)} ".encode()
        for part in parts:
            yield from _content(part, (*around, id(value)))


def _memory(value: Tensor) -> memoryview:
    """The numbers of a dense tensor; those of a contiguous one on the CPU are not copied."""
    numbers = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    memory: memoryview = numbers.reshape(-1).view(torch.uint8).numpy().data
    return memory


def _parts(value: Any) -> Sequence[Any]:
    parts = value.tolist() if isinstance(value, np.ndarray) else value.__reduce_ex__(4)
    if isinstance(parts, str):
        return [parts]
    return [list(part) if isinstance(part, Iterator) else part for part in parts]
