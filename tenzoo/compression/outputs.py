"""What a model makes of its inputs: how far that moves with other weights, and what of it is of which sample."""

import math
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call, Divide
from tenzoo.compression.progress import each
from tenzoo.snapshot import Row, Snapshot, put


def sensitivities(
    model: nn.Module, changed: Mapping[str, tuple[Tensor, float]], calls: Sequence[Call]
) -> dict[str, float]:
    """How far the outputs of a model move, relative to their size, per squared relative error of single weights.

    Args:
        model: Stays as it is; it is run in evaluation mode, once for each weight.
        changed: By the names of parameters, what is put in their places, and its squared relative error.
        calls: With the argument ``calibration`` of the caller.

    Returns:
        ``‖y' − y‖² / (‖y‖² e²)`` by name, y being all outputs together; at most 10⁶ of it, where y' is not finite.

    Raises:
        ValueError: As :func:`outputs`, or if the outputs have other shapes with other weights.
    """
    with evaluating(model):
        before = outputs(model, calls)
        size = _squares(before)
        found: dict[str, float] = {}
        for name, (weight, error) in each(list(changed.items()), "measuring how far the outputs move with layers"):
            with _other_numbers(model, {name: weight}):
                moved = _moved(_all_numbers(model, calls), before)
            found[name] = min(moved / (size * error), 1e6) if size else 1.0
    return found


def output_error(model: nn.Module, changed: Mapping[str, Tensor], calls: Sequence[Call]) -> float:
    """``‖y' − y‖ / ‖y‖`` of all outputs of a model together, with other numbers in some of its weights.

    Args:
        model: Stays as it is; it is run in evaluation mode.
        changed: By the names of parameters, what is put in their places.
        calls: With the argument ``calibration`` of the caller.

    Returns:
        Infinity where an output with these weights is NaN, or infinite where it was not.

    Raises:
        ValueError: As :func:`sensitivities`.
    """
    with evaluating(model):
        before = outputs(model, calls)
        with _other_numbers(model, changed):
            moved = _moved(_all_numbers(model, calls), before)
    return _relative(moved, before)


def dense_outputs(
    model: nn.Module, changed: Mapping[str, Tensor], call: Call, argument: str
) -> tuple[list[Tensor], float | None]:
    """The outputs of a dense model with other numbers in some of its weights.

    Args:
        model: Stays as it is; it is run in evaluation mode.
        changed: By the names of parameters, what is put in their places.
        call: With the argument of this name.
        argument: Where the input came from.

    Returns:
        The outputs, and how far apart those of a second run are, as :func:`difference`: a model may draw random numbers
        of its own.
    """
    with evaluating(model), _other_numbers(model, changed):
        found = numbers_in(repeatably(model, call, argument))
        return found, difference(repeatably(model, call, argument), found)


def difference(result: object, expected: Sequence[Tensor]) -> float | None:
    """The largest ``‖y' − y‖ / ‖y‖`` of an output ``y'`` of a model to another.

    An output that is as small beside the others as their rounding may be nothing else.

    Args:
        result: What the model returned.
        expected: y.

    Returns:
        None if they cannot be compared: they have other shapes, or are none. Infinity where one is NaN or infinite and
        the other is not.
    """
    found = numbers_in(result)
    if not found or [y.shape for y in found] != [y.shape for y in expected]:
        return None
    sizes = [math.sqrt(_squares([y])) for y in expected]
    least = max(sizes) * min(256 * max(torch.finfo(y.dtype).eps for y in expected), 0.1)
    return max(
        math.sqrt(_moved([x], [y])) / max(size, least, torch.finfo(torch.float64).tiny)
        for x, y, size in zip(found, expected, sizes, strict=True)
    )


def _relative(moved: float, before: Sequence[Tensor]) -> float:
    size = _squares(before)
    return math.sqrt(moved / size) if size else math.sqrt(moved)


def _moved(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """``‖y' − y‖²``; infinity that stays does not move.

    Raises:
        ValueError: If shapes differ.
    """
    shapes, others = ([tuple(y.shape) for y in each] for each in (before, after))
    if shapes != others:
        raise ValueError(
            "expected a model whose outputs on `calibration` have the same shapes with any weights, got "
            f"{_shortened(shapes)} and, with layers decomposed, {_shortened(others)}; plan the part of the model that "
            "comes before it chooses what to return"
        )
    moved = 0.0
    for x, y in zip(after, before, strict=True):
        step = x.double() - y
        step[x == y] = 0
        moved += float(step.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).square().sum())
    return moved


def _shortened(shapes: Sequence[tuple[int, ...]]) -> str:
    return f"{str(list(shapes[:3]))[:-1]}{', …' if len(shapes) > 3 else ''}]"


@contextmanager
def _other_numbers(model: nn.Module, changed: Mapping[str, Tensor]) -> Iterator[None]:
    """Other numbers in some parameters, by their names."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for name, number in changed.items():
            parameter = model.get_parameter(name).detach()
            kept.append((parameter, parameter.clone()))
            parameter.copy_(number)
        yield
    finally:
        for parameter, number in reversed(kept):  # of parameters that share memory the first one kept what was there
            parameter.copy_(number)


def outputs(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """The numbers in the outputs of all calls, as :func:`numbers_in`, within :func:`evaluating`.

    Raises:
        ValueError: If there are none, or one is NaN.
    """
    found = []
    for call in calls:
        result = repeatably(model, call, "calibration")
        own = numbers_in(result)
        if not any(y.numel() for y in own):
            raise ValueError(
                f"expected a model that returns floating-point tensors on `calibration`, got a {type(result).__name__}"
                f"{' of empty ones' if own else ''}"
            )
        if any(bool(y.isnan().any()) for y in own):
            raise ValueError("expected a model whose outputs on `calibration` are numbers, got NaN")
        found += own
    return found


def _all_numbers(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    return [y for call in calls for y in numbers_in(repeatably(model, call, "calibration"))]


def numbers_in(result: object) -> list[Tensor]:
    """The floating-point and complex numbers in what a model returns, in memory of their own.

    They are in tensors, arrays and Python's numbers, in containers, and in attributes of objects of any class; there
    Python's numbers are left out, which are settings.

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
    """A tensor as one, or several, that can be compared: dense, and with real numbers."""
    if value.is_nested:
        return [part.clone() for part in value.unbind()]
    value = (value if value.layout is torch.strided else value.to_dense()).resolve_conj()
    return [(torch.view_as_real(value) if value.is_complex() else value).clone()]


def _squares(parts: Sequence[Tensor]) -> float:
    """Sum of all squares, but for infinity, which a mask left."""
    return sum(float(part.double().nan_to_num(0, 0, 0).square().sum()) for part in parts)


# --- samples -------------------------------------------------------------------------------------------------------


def divided(model: nn.Module, call: Call, border: int, argument: str) -> tuple[Call, Call] | None:
    """A call in two, by samples, where a model makes of the parts what are the parts of what it makes of the whole.

    Args:
        model: Stays as it is; it is run in evaluation mode.
        call: With the argument of this name.
        border: How many samples there are in the first part.
        argument: Where the input came from.

    Returns:
        None if there are no such parts: a model may relate the samples to each other, or take something else for them.

    Raises:
        ValueError: If the model does not take the input.
    """
    size = call.size
    whole = _outputs(model, call, argument)
    # As many come first: numbers of samples in another argument would be out of range where there are fewer.
    mixed = [size - 1 - place // 2 for place in range(size)]
    chosen = mixed, range(border), range(border, size)
    for parts in call.parts(*chosen) if whole else ():
        try:
            if all(
                _of_samples(_outputs(model, part, argument), whole, samples, size)
                for part, samples in zip(parts, chosen, strict=True)
            ):
                return parts[1], parts[2]
        except ValueError:  # another way may be right
            continue
    return None


def divider(model: nn.Module) -> Divide:
    """Divides calibration inputs of a model, as :func:`divided`."""
    return partial(divided, model, argument="calibration")


def _outputs(model: nn.Module, call: Call, argument: str) -> list[Tensor]:
    """The floating-point outputs in which samples could be found, those without sizes left out, such as a loss."""
    with evaluating(model):
        return [y for y in numbers_in(repeatably(model, call, argument)) if y.ndim]


def _of_samples(found: Sequence[Tensor], whole: Sequence[Tensor], samples: Sequence[int], size: int) -> bool:
    """Whether outputs are those of some samples among the outputs of all, and not the same for any."""
    each = len(whole) // size  # tensors of a sample, if each has its own
    if len(whole) == each * size and _same(
        found, [whole[sample * each + k] for sample in samples for k in range(each)]
    ):
        return True
    if len(found) != len(whole):
        return False
    divided = [_has_rows(part, y, samples, size) for part, y in zip(found, whole, strict=True)]
    return any(divided) and all(own or _same([part], [y]) for own, part, y in zip(divided, found, whole, strict=True))


def _has_rows(part: Tensor, whole: Tensor, samples: Sequence[int], size: int) -> bool:
    """Whether a tensor has the numbers of these samples in some mode, in which samples come first or last."""
    index = torch.tensor(samples, device=whole.device)
    for mode, length in enumerate(whole.shape if part.ndim == whole.ndim else ()):
        if length % size == 0 and length // size * len(samples) == part.shape[mode] > 0:
            for place, sizes in enumerate([(size, length // size), (length // size, size)]):
                rows = whole.reshape(*whole.shape[:mode], *sizes, *whole.shape[mode + 1 :])
                if _same([part], [rows.index_select(mode + place, index).flatten(mode, mode + 1)]):
                    return True
    return False


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether these are the same outputs but for rounding, which differs between batches of different sizes."""
    if [y.shape for y in found] != [y.shape for y in expected]:
        return False
    if not all(x.isfinite().equal(y.isfinite()) for x, y in zip(found, expected, strict=True)):
        return False
    rounding = max(torch.finfo(y.dtype).eps for y in expected)
    return _relative(_moved(found, expected), expected) <= min(math.sqrt(rounding), max(16 * rounding, 1e-3))


# --- runs ----------------------------------------------------------------------------------------------------------


def repeatably(model: nn.Module, call: Call, argument: str) -> Any:
    """What a model makes of an input; the next run begins with the same state and random numbers.

    Where a run has changed what the model holds, which is put back, returned are its numbers as of :func:`numbers_in`.
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients and without compiled graphs, in which no hook would run.

    The model holds afterwards what it held before, its weights and modes included.
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
    """Let a tensor have the memory and the number that it had; a dense one that has them is not written."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        tensor.data = memory
        tensor.data.copy_(number)
        return
    if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape or tensor.dtype != memory.dtype:
        tensor.data = memory
    if not _bits(tensor.data).equal(_bits(number)):
        tensor.data.copy_(number)


def _bits(tensor: Tensor) -> Tensor:
    """A tensor in which zeros of both signs differ, and NaN is equal to itself."""
    if not tensor.is_floating_point() or tensor.is_neg():
        return tensor
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
