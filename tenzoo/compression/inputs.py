"""What the layers of a model see: how much of it, how it varies, and what comes of it."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call, tensors_in
from tenzoo.compression.progress import LOGGER, each
from tenzoo.compression.readers import Uses
from tenzoo.compression.weights import Weight
from tenzoo.factorizations.decomposition import scaled_to_safety
from tenzoo.layers import TensorizedLayer
from tenzoo.layers.cost import Positions

_RIDGE = 1e-2
"""What is added to the second moments of each mode, whose mean is 1: an input that never varied may still come to."""

_IMAGES = 8
"""Images whose patches are held at a time."""


def observe(model: nn.Module, weights: Sequence[Weight], calls: Sequence[Call], argument: str) -> Uses:
    """Which weights of a model take part in its forward passes, and which of them other modules read.

    Args:
        model: Stays as it is; it is run in evaluation mode.
        weights: Those of interest.
        calls: With the argument of this name.
        argument: Where the inputs came from.

    Raises:
        ValueError: If the model does not take the input.
    """
    LOGGER.info("running the model on `%s`, samples: %d", argument, sum(call.size for call in calls))
    uses = Uses(model, _owners(weights))
    with evaluating(model), uses.following():
        for call in calls:
            repeatably(model, call, argument)
    return uses


def _owners(weights: Sequence[Weight]) -> dict[int, tuple[str, nn.Module]]:
    return {
        id(parameter): (weight.full_name, weight.owner)
        for weight in weights
        if (parameter := weight.owner._parameters.get(weight.parameter)) is not None
    }


def check_seen(weights: Sequence[Weight], uses: Uses) -> None:
    """Refuse weights that no calibration input reached: nothing would be known of their errors.

    Raises:
        ValueError: If there are any.
    """
    unseen = [weight.name for weight in weights if weight.full_name not in uses.used]
    if unseen:
        others = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
        raise ValueError(
            f"expected inputs that reach every layer in `calibration`, got some that do not reach "
            f"{', '.join(map(repr, unseen[:3]))}{others}; leave them out by `exclude`, such as exclude={unseen}"
        )


def count_positions(
    model: nn.Module, weights: Sequence[Weight], layers: Mapping[str, TensorizedLayer[Any]], call: Call
) -> dict[str, Positions]:
    """Rows, pixels or indices that each weight sees for one sample in evaluation mode, all of its calls together.

    The model is run with the first sample. Where its samples cannot be told apart, it is with all, and the numbers are
    divided by how many there are.

    Args:
        model: Stays as it is.
        weights: Of interest; those that stay parameters are followed into torch's functions.
        layers: By the names of the model's layers, their counterparts.
        call: With the argument ``example_input`` of the caller.

    Raises:
        ValueError: If the model does not take the input.
    """
    parts = divided(model, call, 1, "example_input") if call.size > 1 else None
    if parts is not None:
        return _positions(model, weights, layers, parts[0])
    every = _positions(model, weights, layers, call)
    return {name: positions.times(1 / max(call.size, 1)) for name, positions in every.items()}


def _positions(
    model: nn.Module, weights: Sequence[Weight], layers: Mapping[str, TensorizedLayer[Any]], call: Call
) -> dict[str, Positions]:
    seen: dict[str, Positions] = {}

    def note(name: str, x: Tensor) -> None:
        seen[name] = seen.get(name, Positions(0, 0)).plus(layers[name].positions(x))

    uses = Uses(model, _owners(weights))
    with uses.following():
        _watch(model, layers, [call], "example_input", note)
    rows = {weight.name: uses.rows[weight.full_name] for weight in weights if weight.full_name in uses.rows}
    return {name: Positions(number, number) for name, number in rows.items()} | seen


def input_metrics(
    model: nn.Module, layers: Mapping[str, TensorizedLayer[Any]], calls: Sequence[Call]
) -> dict[str, dict[int, Tensor]]:
    """In which metric a change of a layer's weight is the change of its outputs, as far as single modes tell.

    If the patches x that the weight of a layer is multiplied by have the second moments ``C = E[x xᵀ]``, a change D of
    the weight changes the outputs by ``E‖D x‖² = ‖D C^{1/2}‖²``. C is taken for the Kronecker product of its parts for
    the single modes, ``C_k``, and ``S_k = C_k^{1/2}`` is the metric of the mode k, but for its scale.

    Args:
        model: Stays as it is; it is run in evaluation mode.
        layers: By the names of the model's layers, their counterparts.
        calls: With the argument ``calibration`` of the caller, the more samples the better.

    Returns:
        For each layer that was called and multiplies its input, the matrices by the modes of its weight's tensor.

    Raises:
        ValueError: If the model does not take the input.
    """
    moments: dict[str, dict[int, Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        layer = layers[name]
        for part in torch.split(x, _IMAGES) if x.ndim == 4 else (x,):
            patches = layer.patches(part)
            if patches is None:
                return
            own = moments.setdefault(name, {})
            first = len(layer.weight.shape) - (patches.ndim - 1)
            for k in range(1, patches.ndim):
                rows = patches.movedim(k, 0).flatten(1)
                rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows  # half would overflow
                rows, exponent = scaled_to_safety(rows)
                moment = (rows @ rows.t()).double() * 4.0**exponent
                own[first + k - 1] = own[first + k - 1] + moment if first + k - 1 in own else moment

    _watch(model, layers, calls, "calibration", note)
    return {name: {mode: _root(moment) for mode, moment in own.items()} for name, own in moments.items()}


def _root(moment: Tensor) -> Tensor:
    mean = moment.diagonal().mean()
    values, vectors = torch.linalg.eigh(moment / mean if mean > 0 else moment)
    root: Tensor = (vectors * (values.clamp_(min=0) + _RIDGE).sqrt()) @ vectors.t()
    return root


def sensitivities(
    model: nn.Module, changed: Mapping[str, tuple[Tensor, float]], calls: Sequence[Call]
) -> dict[str, float]:
    """How far the outputs of a model move, relative to their size, per squared relative error of single weights.

    Args:
        model: Stays as it is; it is run in evaluation mode, once for each weight.
        changed: By the names of parameters, what is put in their places, and its squared relative error.
        calls: With the argument ``calibration`` of the caller.

    Returns:
        ``‖y' − y‖² / (‖y‖² e²)`` by name, y being all outputs together.

    Raises:
        ValueError: If the outputs hold no floating-point tensor, or NaN.
    """
    with evaluating(model):
        before = outputs(model, calls)
        size = _squares(before)
        found: dict[str, float] = {}
        for name, (weight, error) in each(list(changed.items()), "measuring how far the outputs move with layers"):
            with _other_numbers(model, {name: weight}):
                after = outputs(model, calls)
            moved = _squares([y.double() - x for x, y in zip(before, after, strict=True)])
            found[name] = moved / (size * error) if size else 1.0
    return found


def output_error(model: nn.Module, changed: Mapping[str, Tensor], calls: Sequence[Call]) -> float:
    """``‖y' − y‖ / ‖y‖`` of all outputs of a model together, with other numbers in some of its weights.

    Args:
        model: Stays as it is; it is run in evaluation mode.
        changed: By the names of parameters, what is put in their places.
        calls: With the argument ``calibration`` of the caller.

    Returns:
        Infinity where an output with these weights is NaN.

    Raises:
        ValueError: As :func:`sensitivities`.
    """
    with evaluating(model):
        before = outputs(model, calls)
        with _other_numbers(model, changed):
            try:
                after = outputs(model, calls)
            except ValueError:  # of the unchanged model they were numbers
                return math.inf
    return _difference(after, before)


def dense_outputs(
    model: nn.Module, changed: Mapping[str, Tensor], call: Call, argument: str
) -> tuple[list[Tensor], float | None]:
    """The floating-point outputs of a dense model with other numbers in some of its weights.

    Args:
        model: Stays as it is; it is run in evaluation mode.
        changed: By the names of parameters, what is put in their places.
        call: With the argument of this name.
        argument: Where the input came from.

    Returns:
        The outputs, and how far apart those of a second run are, as :func:`difference`: a model may have a state, or
        draw random numbers of its own.
    """
    with evaluating(model), _other_numbers(model, changed):
        found = _floating(repeatably(model, call, argument))
        return found, difference(repeatably(model, call, argument), found)


def difference(result: object, expected: Sequence[Tensor]) -> float | None:
    """``‖y' − y‖ / ‖y‖`` of the floating-point outputs ``y'`` of a model to others.

    Args:
        result: What the model returned.
        expected: y.

    Returns:
        None if they cannot be compared: they have other shapes, are not finite, or are none.
    """
    found = _floating(result)
    if not found or [y.shape for y in found] != [y.shape for y in expected]:
        return None
    distance = _difference(found, expected)
    return distance if math.isfinite(distance) else None


def _difference(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    size = _squares(before)
    moved = _squares([y.double() - x for x, y in zip(before, after, strict=True)])
    return math.sqrt(moved / size) if size else math.sqrt(moved)


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
    """The floating-point outputs of all calls, those in nested values too, within :func:`evaluating`.

    Raises:
        ValueError: If there is none, or one holds NaN.
    """
    found = []
    for call in calls:
        result = repeatably(model, call, "calibration")
        own = _floating(result)
        if not own:
            raise ValueError(
                f"expected a model that returns floating-point tensors on `calibration`, got a {type(result).__name__}"
            )
        if any(bool(y.isnan().any()) for y in own):
            raise ValueError("expected a model whose outputs on `calibration` are numbers, got NaN")
        found += own
    return found


def _floating(result: object) -> list[Tensor]:
    return [y for y in tensors_in(result) if y.is_floating_point()]


def _squares(parts: Sequence[Tensor]) -> float:
    """Sum of all squares; an output of −inf, which a mask left, does not move."""
    return sum(float(part.double().nan_to_num(0, 0, 0).square().sum()) for part in parts)


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


def _outputs(model: nn.Module, call: Call, argument: str) -> list[Tensor]:
    """The floating-point outputs in which samples could be found, those without sizes left out, such as a loss."""
    with evaluating(model):
        found = [y for y in _floating(repeatably(model, call, argument)) if not y.is_nested and y.ndim]
        return [y.clone() for y in found] if all(y.layout is torch.strided for y in found) else []


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
    for mode, length in enumerate(whole.shape):
        if length and length % size == 0:
            for place, sizes in enumerate([(size, length // size), (length // size, size)]):
                rows = whole.reshape(*whole.shape[:mode], *sizes, *whole.shape[mode + 1 :])
                if _same([part], [rows.index_select(mode + place, index).flatten(mode, mode + 1)]):
                    return True
    return False


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether these are the same outputs but for rounding, which differs between batches of different sizes."""
    if [y.shape for y in found] != [y.shape for y in expected]:
        return False
    if not all(x.isnan().equal(y.isnan()) for x, y in zip(found, expected, strict=True)):
        return False
    rounding = max(torch.finfo(y.dtype).eps for y in expected)
    return _difference(found, expected) <= min(math.sqrt(rounding), max(16 * rounding, 1e-3))


# --- runs ----------------------------------------------------------------------------------------------------------


def repeatably(model: nn.Module, call: Call, argument: str) -> Any:
    """What a model makes of an input; the next run begins with the same attributes and random numbers."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002  (what most code draws from)
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
            return call.run(model, argument)
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        for module, own in attributes:
            vars(module).clear()
            vars(module).update(own)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients and without compiled graphs, in which no hook would run.

    Modes and buffers are what they were afterwards; what a run puts into attributes is gone after it.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {module: dict(module._buffers) for module in model.modules()}
    numbers = {x: x.clone() for own in buffers.values() for x in own.values() if x is not None and not x.is_meta}
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
            module._buffers.update(buffers[module])
        with torch.no_grad():
            for x, number in numbers.items():
                if not x.equal(number):
                    x.copy_(number)


def _watch(
    model: nn.Module,
    layers: Mapping[str, Any],
    calls: Sequence[Call],
    argument: str,
    note: Callable[[str, Tensor], None],
) -> None:
    """Run a model in evaluation mode, and tell the names and the inputs of its layers as they are called."""
    handles = []
    for name in layers:

        def tell(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any, name: str = name
        ) -> None:
            x = next((x for x in (*inputs, *named.values()) if isinstance(x, Tensor)), None)
            if x is not None:
                note(name, x.detach())

        handles.append(model.get_submodule(name).register_forward_hook(tell, with_kwargs=True))
    try:
        LOGGER.info("measuring the inputs of %d layers", len(layers))
        with evaluating(model):
            for call in calls:
                repeatably(model, call, argument)
    finally:
        for handle in handles:
            handle.remove()
