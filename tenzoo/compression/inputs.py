"""The inputs of a model's layers: which layers they reach, and how many they are."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from tenzoo.compression.calls import Call
from tenzoo.compression.progress import LOGGER
from tenzoo.compression.replaceable import Weight
from tenzoo.compression.runs import evaluating, repeatably
from tenzoo.compression.samples import selected
from tenzoo.compression.uses import Uses
from tenzoo.layers import TensorizedLayer
from tenzoo.layers.cost import Positions


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

    def note(name: str, x: Tensor | None, output: Tensor) -> None:
        if x is not None:
            seen[name] = seen.get(name, Positions(0, 0)).plus(layers[name].positions(x.detach()))

    uses = Uses(_names(weights))
    LOGGER.info("measuring the inputs of %d layers", len(layers))
    with uses, watching(model, layers, note), evaluating(model):
        repeatably(model, call, "example_input")
    rows = {weight.name: uses.rows[weight.full_name] for weight in weights if weight.full_name in uses.rows}
    return Seen({name: Positions(number, number) for name, number in rows.items()} | seen, frozenset(seen))


@contextmanager
def watching(
    model: nn.Module, names: Iterable[str], tell: Callable[[str, Tensor | None, Tensor], Tensor | None]
) -> Iterator[None]:
    """Tell of each call of layers.

    Args:
        model: Their model.
        names: Their names in it.
        tell: Gets the name of a layer, the first tensor that it was called with and its output, and gives what it
            returns in place of the output, or None.
    """

    def hook(name: str) -> Callable[..., Tensor | None]:
        def told(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            return tell(name, next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None), output)

        return told

    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
