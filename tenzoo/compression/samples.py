"""Which part of a model's inputs and outputs belongs to which sample."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call, Divide
from tenzoo.compression.outputs import moved, relative
from tenzoo.compression.runs import evaluating, numbers_in, repeatably

_SAMPLES = 16
"""Number of samples in a backward pass."""


def divided(model: nn.Module, call: Call, border: int, argument: str) -> tuple[Call, Call] | None:
    """A call in two, by samples.

    Args:
        model: A model that stays as it is; it runs in evaluation mode.
        call: The call to divide.
        border: Number of samples in the first part.
        argument: The argument that the call came from.

    Returns:
        None if the samples cannot be told apart, as :func:`selected`.

    Raises:
        ValueError: If the model does not take the input.
    """
    parts = selected(model, call, [range(border), range(border, call.size)], argument)
    return None if parts is None else (parts[0], parts[1])


def selected(model: nn.Module, call: Call, chosen: Sequence[Sequence[int]], argument: str) -> list[Call] | None:
    """Some of the samples of a call, where the outputs for them are the same part of the outputs for the whole call.

    The model runs on the whole call, on as many of its last samples, each of them twice, and on each selection.

    Args:
        model: A model that stays as it is; it runs in evaluation mode.
        call: The whole call.
        chosen: Numbers of the samples of each selection.
        argument: The argument that the call came from.

    Returns:
        None if there are no such parts: a model may relate the samples to each other, or its samples may lie elsewhere.

    Raises:
        ValueError: If the model does not take the input.
    """
    size = call.size
    whole = _outputs(model, call, argument)
    # As many come first: numbers of samples in another argument would be out of range where there are fewer.
    mixed = [size - 1 - place // 2 for place in range(size)]
    for parts in call.parts(mixed, *chosen) if whole else ():
        try:
            if all(
                _of_samples(_outputs(model, part, argument), whole, samples, size)
                for part, samples in zip(parts, (mixed, *chosen), strict=True)
            ):
                return parts[1:]
        except ValueError:  # another way may be right
            continue
    return None


def in_pieces(model: nn.Module, call: Call) -> list[Call]:
    """A calibration call in parts of few samples, whose gradients fit in memory; whole if samples cannot be told apart.

    Raises:
        ValueError: If the model does not take the input.
    """
    samples = range(call.size)
    parts = [samples[start : start + _SAMPLES] for start in range(0, call.size, _SAMPLES)]
    return (selected(model, call, parts, "calibration") if len(parts) > 1 else None) or [call]


def divider(model: nn.Module) -> Divide:
    """A function that divides calibration inputs of a model, as :func:`divided`."""
    return partial(divided, model, argument="calibration")


def _outputs(model: nn.Module, call: Call, argument: str) -> list[Tensor]:
    """The floating-point outputs that may have samples; those without sizes, such as a loss, are left out."""
    with evaluating(model):
        return [y for y in numbers_in(repeatably(model, call, argument)) if y.ndim]


def _of_samples(found: Sequence[Tensor], whole: Sequence[Tensor], samples: Sequence[int], size: int) -> bool:
    """Whether outputs are those of these samples among the outputs of all samples, and depend on the samples."""
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
    """Whether a tensor holds the numbers of these samples in some mode, where samples come first or last."""
    index = torch.tensor(samples, device=whole.device)
    for mode, length in enumerate(whole.shape if part.ndim == whole.ndim else ()):
        if length % size == 0 and length // size * len(samples) == part.shape[mode] > 0:
            for place, sizes in enumerate([(size, length // size), (length // size, size)]):
                rows = whole.reshape(*whole.shape[:mode], *sizes, *whole.shape[mode + 1 :])
                if _same([part], [rows.index_select(mode + place, index).flatten(mode, mode + 1)]):
                    return True
    return False


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether these outputs are equal up to rounding, which depends on the size of the batch."""
    if [y.shape for y in found] != [y.shape for y in expected]:
        return False
    if not all(x.isfinite().equal(y.isfinite()) for x, y in zip(found, expected, strict=True)):
        return False
    rounding = max(torch.finfo(y.dtype).eps for y in expected)
    return relative(moved(found, expected), expected) <= min(math.sqrt(rounding), max(16 * rounding, 1e-3))
