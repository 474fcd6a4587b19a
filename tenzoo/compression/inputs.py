"""What the layers of a model see: how much of it, and how it varies."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call
from tenzoo.compression.progress import LOGGER
from tenzoo.compression.readers import Uses
from tenzoo.compression.replaceable import Weight
from tenzoo.compression.runs import evaluating, repeatably
from tenzoo.compression.samples import selected
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

    They are what a second sample adds to the first: what a model does once in a call, such as for a table of its own,
    is done for no sample. Where the samples cannot be told apart, the model is run with all, and the numbers are
    divided by how many there are.

    Args:
        model: Stays as it is.
        weights: Of interest; those that stay parameters are followed into torch's functions.
        layers: By the names of the model's layers, their counterparts.
        call: With the argument ``example_input`` of the caller.

    Raises:
        ValueError: If the model does not take the input.
    """
    samples = range(call.size)
    chosen = [samples[:1], samples[1:]] + ([samples[:2], samples[2:]] if call.size > 2 else [])
    parts = selected(model, call, chosen, "example_input") if call.size > 1 else None
    if parts is None:
        total = _positions(model, weights, layers, call)
        return {name: positions.times(1 / max(call.size, 1)) for name, positions in total.items()}
    one, two = (_positions(model, weights, layers, part) for part in (parts[0], parts[2] if call.size > 2 else call))
    return {name: positions.beyond(one.get(name, Positions(0, 0))) for name, positions in two.items()}


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
