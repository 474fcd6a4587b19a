"""The inputs of a model's layers: which layers they reach, how many they are, and how they vary."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call
from tenzoo.compression.progress import LOGGER
from tenzoo.compression.replaceable import Weight
from tenzoo.compression.runs import evaluating, repeatably
from tenzoo.compression.samples import selected
from tenzoo.compression.uses import Uses
from tenzoo.factorizations.decomposition import scaled_to_safety
from tenzoo.layers import TensorizedLayer
from tenzoo.layers.cost import Positions

_RIDGE = 1e-2
"""Added to the second moments of each mode, whose mean is 1: an input that never varied may vary later."""

_UNSEEN = 0.5
"""Added to the frequencies of rows of a table, whose mean is 1: a row that was never looked up may be later."""

_IMAGES = 8
"""Number of images whose patches are in memory at a time."""


def observe(model: nn.Module, weights: Sequence[Weight], calls: Sequence[Call], argument: str) -> set[str]:
    """Full names of the weights that take part in a model's forward passes.

    Args:
        model: A model that stays as it is; it runs in evaluation mode.
        weights: The weights to observe.
        calls: The inputs.
        argument: The argument that the inputs came from.

    Raises:
        ValueError: If the model does not take the input.
    """
    LOGGER.info("running the model on `%s`, samples: %d", argument, sum(call.size for call in calls))
    uses = Uses(_names(weights))
    with evaluating(model), uses:
        for call in calls:
            repeatably(model, call, argument)
    return uses.used


def _names(weights: Sequence[Weight]) -> dict[int, str]:
    return {
        id(parameter): weight.full_name
        for weight in weights
        if (parameter := weight.owner._parameters.get(weight.parameter)) is not None
    }


def check_seen(weights: Sequence[Weight], used: Collection[str]) -> None:
    """Refuse weights that no calibration input reached: their errors would be unknown.

    Args:
        weights: The weights that may become cores.
        used: Full names of the weights that took part in forward passes.

    Raises:
        ValueError: If there are any.
    """
    unseen = [weight.name for weight in weights if weight.full_name not in used]
    if unseen:
        others = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
        raise ValueError(
            f"expected inputs that reach every layer in `calibration`, got some that do not reach "
            f"{', '.join(map(repr, unseen[:3]))}{others}; leave them out by `exclude`, such as exclude={unseen}"
        )


class Seen(NamedTuple):
    """What a forward pass tells of weights, by name."""

    positions: dict[str, Positions]
    """Rows, pixels or indices that each weight sees."""

    called: frozenset[str]
    """The layers that the model calls; it reads the weights of the others."""


def count_positions(
    model: nn.Module, weights: Sequence[Weight], layers: Mapping[str, TensorizedLayer[Any]], call: Call
) -> Seen:
    """Rows, pixels or indices that each weight sees for one sample in evaluation mode, over all calls of its layer.

    They are what a second sample adds to the first: work that a model does once in a call, such as on a table of its
    own, belongs to no sample. If the samples cannot be told apart, the model runs on all of them, and the numbers are
    divided by the number of samples.

    Args:
        model: A model that stays as it is.
        weights: The weights to count for; those that code reads are followed into torch's functions.
        layers: By the names of the model's layers, their tensorized counterparts.
        call: The input from the argument ``example_input`` of the caller.

    Raises:
        ValueError: If the model does not take the input.
    """
    samples = range(call.size)
    chosen = [samples[:1], samples[1:]] + ([samples[:2], samples[2:]] if call.size > 2 else [])
    parts = selected(model, call, chosen, "example_input") if call.size > 1 else None
    if parts is None:
        total, called = _positions(model, weights, layers, call)
        return Seen({name: positions.times(1 / max(call.size, 1)) for name, positions in total.items()}, called)
    one, two = (_positions(model, weights, layers, part) for part in (parts[0], parts[2] if call.size > 2 else call))
    none = Positions(0, 0)
    return Seen({name: own.beyond(one.positions.get(name, none)) for name, own in two.positions.items()}, two.called)


def _positions(
    model: nn.Module, weights: Sequence[Weight], layers: Mapping[str, TensorizedLayer[Any]], call: Call
) -> Seen:
    seen: dict[str, Positions] = {}

    def note(name: str, x: Tensor) -> None:
        seen[name] = seen.get(name, Positions(0, 0)).plus(layers[name].positions(x))

    uses = Uses(_names(weights))
    with uses:
        _watch(model, layers, [call], "example_input", note)
    rows = {weight.name: uses.rows[weight.full_name] for weight in weights if weight.full_name in uses.rows}
    return Seen({name: Positions(number, number) for name, number in rows.items()} | seen, frozenset(seen))


def input_metrics(
    model: nn.Module, layers: Mapping[str, TensorizedLayer[Any]], calls: Sequence[Call]
) -> dict[str, dict[int, Tensor]]:
    """The metrics in which the change of a layer's weight is, approximately, the change of its outputs.

    If the patches x that the weight of a layer is multiplied by have the second moments ``C = E[x xᵀ]``, a change D of
    the weight changes the outputs by ``E‖D x‖² = ‖D C^{1/2}‖²``. C is approximated by the Kronecker product of its
    parts for the single modes, ``C_k``, and ``S_k = C_k^{1/2}`` is the metric of the mode k, up to its scale. The rows
    of an embedding are looked up: C is the diagonal of their frequencies.

    Args:
        model: A model that stays as it is; it runs in evaluation mode.
        layers: By the names of the model's layers, their tensorized counterparts.
        calls: Inputs from the argument ``calibration`` of the caller; more samples make better metrics.

    Returns:
        For each layer that was called, one matrix for each input mode of its weight's tensor; of an embedding, the
        diagonals for the modes of its rows.

    Raises:
        ValueError: If the model does not take the input.
    """
    moments: dict[str, dict[int, Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        own = moments.setdefault(name, {})
        for mode, moment in _moments(layers[name], x):
            own[mode] = own[mode] + moment if mode in own else moment

    _watch(model, layers, calls, "calibration", note)
    return {name: {mode: _root(moment) for mode, moment in own.items()} for name, own in moments.items()}


def _moments(layer: TensorizedLayer[Any], x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Second moments of one input, for single modes of the layer's tensor; of a table the numbers of look-ups."""
    if (numbers := layer.look_ups(x)) is not None:
        for mode in range(numbers.ndim):
            yield mode, numbers.movedim(mode, 0).reshape(numbers.shape[mode], -1).sum(1).double()
        return
    for part in torch.split(x, _IMAGES) if x.ndim == 4 else (x,):
        patches = layer.patches(part)
        if patches is None:
            return
        first = len(layer.factorization.shape) - (patches.ndim - 1)
        for k in range(1, patches.ndim):
            rows = patches.movedim(k, 0).flatten(1)
            rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows  # half would overflow
            rows, exponent = scaled_to_safety(rows)
            yield first + k - 1, (rows @ rows.t()).double() * 4.0**exponent


def _root(moment: Tensor) -> Tensor:
    if moment.ndim == 1:
        mean = moment.mean()
        return ((moment / mean if mean > 0 else moment) + _UNSEEN).sqrt()
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
    """Run a model in evaluation mode, and note the names and the inputs of its layers as they are called."""
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
