"""Forward passes of a model that leave it as it was, and the numbers that it returns."""

import random
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call
from tenzoo.snapshot import Row, Snapshot, put


def repeatably(model: nn.Module, call: Call, argument: str) -> Any:
    """The outputs of a model for an input; the next run begins with the same state and random numbers.

    If a run changes the state of the model, the state is put back, and the result is a copy, the :func:`numbers_in` the
    outputs.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002  (what most code draws from)
    held = Snapshot(model.modules(), whole=True)
    changed: list[Row] | None = None
    try:
        with torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
            result = call.run(model, argument)
            changed = held.changed()
            return (changed and numbers_in(result)) or result
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        put(held.changed() if changed is None else changed)


def counted(call: Call, result: object) -> list[Tensor]:
    """The :func:`numbers_in` the outputs of a call, without those of padding.

    Where the call has a tensor ``attention_mask`` of integers or booleans ``(N, T)``, as tokenizers give it, outputs
    ``(N, T, …)`` are 0 where it is 0.
    """
    mask = call.kwargs.get("attention_mask")
    found = numbers_in(result)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point():
        return found
    padding = mask == 0
    return [
        y.masked_fill(padding.to(y.device).view(*mask.shape, *(1,) * (y.ndim - 2)), 0)
        if y.ndim > 2 and y.shape[:2] == mask.shape
        else y
        for y in found
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients and without compiled graphs, in which no hook would run.

    Afterwards the model has the state that it had before, its weights and modes included.
    """
    modes = {module: module.training for module in model.modules()}
    held = Snapshot(modes, whole=True)
    tensors = [thing for thing, *_ in held.rows.values() if isinstance(thing, Tensor)]
    numbers = [(x, x.data, x.data.clone()) for x in tensors if not x.is_meta]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.eval()
            yield
    finally:
        try:
            for module, mode in modes.items():
                if type(module).train is not nn.Module.train:  # which may tell other objects
                    module.train(mode)
        finally:
            put(row for row in held.changed() if not isinstance(row[0], Tensor))
            for x, memory, number in numbers:
                _put_back(x, memory, number)


def _put_back(tensor: Tensor, memory: Tensor, number: Tensor) -> None:
    """Give a tensor its memory and its numbers back; a dense tensor that has them is not written."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        tensor.data = memory
        tensor.data.copy_(number)
        return
    if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape or tensor.dtype != memory.dtype:
        tensor.data = memory
    if not _bits(tensor.data).equal(_bits(number)):
        tensor.data.copy_(number)


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor: zeros of both signs differ, and NaN is equal to itself."""
    if not tensor.is_floating_point() or tensor.is_neg():
        return tensor
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def numbers_in(result: object) -> list[Tensor]:
    """Copies of the floating-point and complex numbers in what a model returns.

    They are in tensors, arrays and Python's numbers, in containers, and in attributes of objects of any class. Python's
    numbers in attributes are settings, and are left out.

    Example:
        >>> [y.tolist() for y in numbers_in([torch.ones(1), {"loss": 2.0, "counts": 3}])]
        [[1.0], 2.0]
    """
    found: list[Tensor] = []
    _gather(result, found, set(), inside=False)
    return found


def _gather(value: Any, found: list[Tensor], seen: set[int], *, inside: bool) -> None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fc":
        value = torch.from_numpy(np.array(value))
    elif isinstance(value, float | complex) and not inside:
        value = torch.tensor(value, dtype=torch.complex128 if isinstance(value, complex) else torch.float64)
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            found += _plain(value)
    elif isinstance(value, nn.Module | type | ModuleType | FunctionType) or id(value) in seen:
        return
    else:
        seen.add(id(value))
        if isinstance(value, Mapping):
            parts: Any = value.values()
        elif isinstance(value, list | tuple | set | frozenset | deque):
            parts = value
        else:
            slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
            parts = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
            inside = True
        for part in parts:
            _gather(part, found, seen, inside=inside)


def _plain(value: Tensor) -> list[Tensor]:
    """A tensor as dense tensors of real numbers, which can be compared."""
    if value.is_nested:
        return [part.clone() for part in value.unbind()]
    value = (value if value.layout is torch.strided else value.to_dense()).resolve_conj()
    return [(torch.view_as_real(value) if value.is_complex() else value).clone()]
