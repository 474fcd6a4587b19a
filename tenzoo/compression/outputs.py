"""How far the outputs of a model move when some of its weights have other numbers."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call
from tenzoo.compression.progress import each
from tenzoo.compression.runs import counted, evaluating, numbers_in, repeatably


def sensitivities(
    model: nn.Module, changed: Mapping[str, tuple[Callable[[], Tensor], float]], calls: Sequence[Call]
) -> dict[str, float]:
    """How far the outputs of a model move, relative to their size, per squared relative error of single weights.

    Args:
        model: A model that stays as it is; it runs in evaluation mode, once for each weight.
        changed: By the names of parameters, a function that makes other numbers for the parameter, and their squared
            relative error. One weight is made at a time.
        calls: Inputs from the argument ``calibration`` of the caller.

    Returns:
        ``‖y' − y‖² / (‖y‖² e²)`` by name, where y is all outputs together; at most 10⁶, also where y' is not finite.

    Raises:
        ValueError: As :func:`outputs`, or if the shapes of the outputs depend on the weights.
    """
    with evaluating(model):
        before = outputs(model, calls)
        size = squares(before)
        found: dict[str, float] = {}
        for name, (make, error) in each(list(changed.items()), "measuring how far the outputs move with layers"):
            with _other_numbers(model, name, make()):
                distance = moved(_all_numbers(model, calls), before)
            found[name] = min(distance / (size * error), 1e6) if size else 1.0
    return found


def output_error(
    model: nn.Module, changed: Iterable[tuple[str, Tensor]], calls: Sequence[Call], expected: Sequence[Tensor]
) -> float:
    """``‖y' − y‖ / ‖y‖`` of all outputs of a model together, with other numbers in some of its weights.

    Args:
        model: A model that stays as it is; it runs in evaluation mode.
        changed: Names of parameters and the numbers to put into them, taken one at a time.
        calls: Inputs from the argument ``calibration`` of the caller.
        expected: The outputs y of the model itself, from :func:`dense_outputs`.

    Returns:
        Infinity where an output with these weights is NaN, or infinite where y is not.

    Raises:
        ValueError: As :func:`sensitivities`.
    """
    with evaluating(model):  # puts the numbers back
        _put_numbers(model, changed)
        distance = moved(_all_numbers(model, calls), expected)
    return relative(distance, expected)


def dense_outputs(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """The outputs of a model in evaluation mode, as :func:`outputs`; the model stays as it is."""
    with evaluating(model):
        return outputs(model, calls)


def repeated_outputs(
    model: nn.Module, changed: Iterable[tuple[str, Tensor]], call: Call, argument: str
) -> tuple[list[Tensor], float | None]:
    """The outputs of a dense model with other numbers in some of its weights, and how repeatable they are.

    Args:
        model: A model that stays as it is; it runs in evaluation mode.
        changed: Names of parameters and the numbers to put into them, taken one at a time.
        call: The input.
        argument: The argument that the input came from.

    Returns:
        The outputs, and their :func:`difference` to those of a second run: a model may draw random numbers of its own.
    """
    with evaluating(model):  # puts the numbers back
        _put_numbers(model, changed)
        found = numbers_in(repeatably(model, call, argument))
        return found, difference(repeatably(model, call, argument), found)


def difference(result: object, expected: Sequence[Tensor]) -> float | None:
    """The largest ``‖y' − y‖ / ‖y‖`` of an output ``y'`` of a model to another.

    An output that is no larger than the rounding of the other outputs counts with the size of that rounding.

    Args:
        result: What the model returned.
        expected: y.

    Returns:
        None if the outputs cannot be compared: they have other shapes, or there are none. Infinity where one is NaN or
        infinite and the other is not.
    """
    found = numbers_in(result)
    if not found or [y.shape for y in found] != [y.shape for y in expected]:
        return None
    sizes = [math.sqrt(squares([y])) for y in expected]
    least = max(sizes) * min(256 * max(torch.finfo(y.dtype).eps for y in expected), 0.1)
    return max(
        math.sqrt(moved([x], [y])) / max(size, least, torch.finfo(torch.float64).tiny)
        for x, y, size in zip(found, expected, sizes, strict=True)
    )


def outputs(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """The numbers in the outputs of all calls, as :func:`~tenzoo.compression.runs.counted`.

    Call it within :func:`~tenzoo.compression.runs.evaluating`.

    Raises:
        ValueError: If there are none, or one is NaN.
    """
    found = []
    for call in calls:
        result = repeatably(model, call, "calibration")
        own = counted(call, result)
        if not any(y.numel() for y in own):
            raise ValueError(
                f"expected a model that returns floating-point tensors on `calibration`, got a {type(result).__name__}"
                f"{' of empty ones' if own else ''}"
            )
        if any(bool(y.isnan().any()) for y in own):
            raise ValueError("expected a model whose outputs on `calibration` are numbers, got NaN")
        found += own
    return found


def relative(distance: float, before: Sequence[Tensor]) -> float:
    """The root of a squared distance, relative to the norm of the outputs unless that is 0."""
    size = squares(before)
    return math.sqrt(distance / size) if size else math.sqrt(distance)


def moved(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
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
    total = 0.0
    for x, y in zip(after, before, strict=True):
        step = x.double() - y
        step[x == y] = 0
        total += float(step.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).square().sum())
    return total


def _shortened(shapes: Sequence[tuple[int, ...]]) -> str:
    return f"{str(list(shapes[:3]))[:-1]}{', …' if len(shapes) > 3 else ''}]"


def _put_numbers(model: nn.Module, changed: Iterable[tuple[str, Tensor]]) -> None:
    for name, number in changed:
        model.get_parameter(name).detach().copy_(number)


@contextmanager
def _other_numbers(model: nn.Module, name: str, number: Tensor) -> Iterator[None]:
    """Other numbers in one parameter, by its name."""
    parameter = model.get_parameter(name).detach()
    before = parameter.clone()
    try:
        parameter.copy_(number)
        yield
    finally:
        parameter.copy_(before)


def _all_numbers(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    return [y for call in calls for y in counted(call, repeatably(model, call, "calibration"))]


def squares(parts: Sequence[Tensor]) -> float:
    """Sum of all squares; infinity, as a mask leaves it, counts as 0."""
    return sum(float(part.double().nan_to_num(0, 0, 0).square().sum()) for part in parts)
