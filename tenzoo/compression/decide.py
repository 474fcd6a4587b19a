"""From a trained network to a plan: which layers become cores, of which ranks, and their decompositions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast, get_args

import torch
from torch import nn

from tenzoo.compression.calibrate import ChooseRanks, better, in_metrics, weighed
from tenzoo.compression.calls import Call, hold_back, take
from tenzoo.compression.decompositions import Decompositions, decompose
from tenzoo.compression.fingerprint import fingerprint
from tenzoo.compression.inputs import check_seen, count_positions, observe
from tenzoo.compression.options import Decomposer, LayerOptions
from tenzoo.compression.plans import Counted, Plan
from tenzoo.compression.ranks import Budget, given_ranks
from tenzoo.compression.reading import Example, read_call, read_calls
from tenzoo.compression.replaceable import Weight, find_weights
from tenzoo.compression.samples import divider
from tenzoo.dynamics import is_distributed
from tenzoo.factorizations import FactorizationName, Rank, factorization_class
from tenzoo.factorizations.decomposition import full_precision

_AUTO = ("tt", "tucker", "cp", "tr")
"""The formats of ``factorization="auto"``. The sensitivities are measured with the first, whose errors are known."""

_WEIGHED = 64
"""Number of samples for the sensitivities, each of which takes a pass for every layer."""


@full_precision()
def plan(
    model: nn.Module,
    *,
    factorization: FactorizationName,
    budget: float | None = None,
    ranks: Rank | Mapping[str, Rank] | None = None,
    count: Counted = "parameters",
    example_input: Example | None = None,
    calibration: Example | None = None,
    exclude: Sequence[str] = (),
) -> Plan:
    """Decide what each layer of a trained network becomes, without changing it.

    With a budget, ranks are chosen for the whole network at once. A layer with the relative error ``e = ‖W − Ŵ‖ / ‖W‖``
    is assumed to keep the share ``1 − e²`` of its signal and to add noise of the share ``e²``. A parameter goes where
    it reduces the sum of all layers' noise-to-signal ratios ``e² / (1 − e²)`` most. With calibration data it goes where
    it reduces ``Σ s e²`` most, where s is the sensitivity of the network's outputs to the layer. A layer that is not
    worth its cores stays dense, and the network never exceeds the budget.

    Convolutions are decomposed with whole modes, as ``(O, k_h k_w, I)``, linear layers and embeddings as matrices; a
    block tensor train splits its modes as the layer does by default. An autocast around the call has no effect.

    The plan keeps the cores that it decomposed in memory, and :func:`~tenzoo.compression.apply_` uses them.

    Args:
        model: A trained module, which stays as it is.
        factorization: Name of a format, such as ``"tt"``, or an einsum; ``"auto"`` takes for each layer the one of CP,
            Tucker, tensor ring and tensor train with the smallest error under the budget, by the estimates of
            :meth:`~tenzoo.factorizations.Factorization.errors_by_rank`.
        budget: A float in (0, 1] is a fraction of the whole network's number, an int an absolute number below it.
        ranks: Instead of a budget: one rank for all layers, or a mapping from names of layers to ranks, where the
            layers it leaves out stay dense. A layer stays dense if it would not get smaller, or if rank one exceeds the
            fraction that is given for all layers.
        count: What the budget counts; ``"multiplications"`` are those of the planned layers for one sample of
            ``example_input``, whose number of samples is the first size of its first tensor. They are those of a large
            batch: work that a call does once counts for nothing. With such a budget layers contract their input with
            the cores, even where their dense weight would be faster. Weights that other code reads, such as those of
            recurrent layers, are reconstructed, which saves no multiplications.
        example_input: What the model is called with, in any of the forms of :mod:`~tenzoo.compression.reading`: a
            tensor, a tuple or list of arguments, a mapping of them by name, or a ``DataLoader``, of which the first
            batch is used. It is needed to count multiplications.
        calibration: Inputs of the kind the model will see, without labels, in the same forms; about 100 images are
            enough, and of a ``DataLoader`` the first 128 samples are used. In the choice of ranks and in the
            decompositions, the errors are then those of the model's outputs, as
            :func:`~tenzoo.compression.metrics.output_metrics` approximates them, and not those of the weights. The
            weights of attention and recurrent layers, whose inputs are not seen, keep the error of the weight; their
            sensitivity still counts. Where an ``attention_mask`` ``(N, T)`` is 0, outputs ``(N, T, …)`` do not count. A
            quarter of the samples is held back, if the network tells samples apart. Of this
            plan and of the plan without the inputs, the one with the smaller error of the network's outputs on them is
            returned.
        exclude: Names of layers that stay dense; the name of an attention or recurrent layer stands for all its
            weights.

    Returns:
        The plan, with the errors of the decompositions.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a name is not that of a layer, a rank does not fit, the budget cannot be met, or not exactly one
            of ``budget`` and ``ranks`` is given.
        MemoryError: If a decomposition would take more than 8 GiB on top of its weight (see
            :meth:`~tenzoo.factorizations.Factorization.decompose`).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3))
        >>> small = plan(model, factorization="tucker", budget=0.5)
        >>> small.parameters <= 0.5 * small.dense_parameters
        True
    """
    formats = _formats(factorization, ranks)
    _check_settings(budget, ranks, count, example_input)
    weights = _find_weights(model)
    divide = divider(model)
    example = None if example_input is None else read_call(example_input, "example_input", model)
    calls = [] if calibration is None else read_calls(calibration, "calibration", model, divide)
    calibration_hash = fingerprint(calls) if calls else None
    _check_numbers(weights)
    options = _options(model, weights, formats, ranks, exclude, example, calls)
    given = None if ranks is None else given_ranks(options, ranks)
    choose: ChooseRanks
    counts: Counted
    if given is not None:
        choose, counts = (lambda _: given), "parameters"
    else:
        choose, counts = partial(Budget.of(cast(float, budget), model, options, count).ranks, model), count
    if calls:
        fitted, held = hold_back(calls, divide)
        by_outputs = in_metrics(model, options, given or given_ranks(options, 1), fitted)
        if given is None:
            by_outputs = weighed(model, by_outputs, list(take(fitted, _WEIGHED, divide)))
        found, replacements = better(model, by_outputs, options, choose, held)
        found = replace(found, held_back=held is not fitted)
    else:
        found, replacements = decompose(model, options, choose(options))
    found = replace(found, data_aware=bool(calls), calibration=calibration_hash, counts=counts)
    found.keep_decompositions(Decompositions(model, replacements))
    return found


# --- the layers ----------------------------------------------------------------------------------------------------


def _find_weights(model: nn.Module) -> list[Weight]:
    """The weights of a model, before it is run."""
    weights = find_weights(model)
    if not weights:
        raise ValueError(
            "expected convolutions, linear, attention or recurrent layers or embeddings in `model`, got "
            f"{type(model).__name__} without any (those of quantized networks have no parameters; quantize after)"
        )
    return weights


def _options(
    model: nn.Module,
    weights: Sequence[Weight],
    formats: Sequence[str],
    ranks: Rank | Mapping[str, Rank] | None,
    exclude: Sequence[str],
    example: Call | None,
    calls: Sequence[Call],
) -> list[LayerOptions]:
    """The options of all layers, with the reasons of those that stay dense."""
    used: set[str] = set()
    if calls or example is not None:
        inputs, argument = (calls, "calibration") if calls else ([cast(Call, example)], "example_input")
        used = observe(model, weights, inputs, argument)
    _check_names(exclude, weights, "exclude")
    if isinstance(ranks, Mapping):
        _check_names(list(ranks), weights, "ranks")
    options = [
        LayerOptions(tuple(Decomposer(weight, each) for each in formats), _reason(weight, formats, ranks, exclude))
        for weight in weights
    ]
    if calls:
        check_seen([option.weight for option in options if option.reason is None], used)
    if example is None:
        return options
    layers = {option.weight.name: layer for option in options if (layer := option.layer_of_cores) is not None}
    positions, called = count_positions(model, weights, layers, example)
    return [
        replace(option, positions=positions.get(option.weight.name), called=option.weight.name in called)
        for option in options
    ]


def _reason(
    weight: Weight, formats: Sequence[str], ranks: Rank | Mapping[str, Rank] | None, exclude: Sequence[str]
) -> str | None:
    """Why a weight stays dense; None if it need not."""
    if weight.name in exclude or weight.module_name in exclude:
        return "was excluded"
    if weight.reason is None and isinstance(ranks, Mapping) and weight.name not in ranks:
        return "is not among the given ranks"
    if weight.reason is None and not all(map(weight.fits, formats)):
        return f"has no tensor of the format {formats[0]}"
    return weight.reason


# --- arguments -----------------------------------------------------------------------------------------------------


def _formats(factorization: FactorizationName, ranks: object) -> tuple[str, ...]:
    """The formats that are tried."""
    if factorization != "auto":
        return (factorization_class(factorization).name,)
    if ranks is not None:
        raise ValueError(f"expected a `budget` with factorization='auto', got ranks={ranks!r}")
    return _AUTO


def _check_settings(budget: object, ranks: object, count: object, example_input: object) -> None:
    if count not in get_args(Counted):
        raise ValueError(f"expected one of {list(get_args(Counted))} in `count`, got {count!r}")
    if (budget is None) == (ranks is None):
        raise ValueError(f"expected one of `budget` and `ranks`, got budget={budget!r} and ranks={ranks!r}")
    if count == "multiplications" and example_input is None:
        raise ValueError("expected an `example_input` to count multiplications for, got None")


def _check_numbers(weights: Sequence[Weight]) -> None:
    for weight in weights:
        if is_distributed(weight.dense):
            raise ValueError(
                f"expected whole parameters in `model`, got {weight.full_name!r}, which is sharded; compress the model "
                "in one process"
            )
        if weight.dense.is_meta:
            raise ValueError(f"expected numbers in `model`, got {weight.full_name!r} on the meta device")
        if weight.reason is None and not bool(torch.isfinite(weight.dense).all()):
            raise ValueError(f"expected finite weights in `model`, got NaN or infinity in {weight.full_name!r}")


def _check_names(names: Sequence[str], weights: Sequence[Weight], argument: str) -> None:
    known = [weight.name for weight in weights]
    modules = {weight.module_name for weight in weights} if argument == "exclude" else set()
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"expected names of layers in `{argument}`, got {names!r}")
    for name in names:
        if name not in known and name not in modules:
            raise ValueError(f"expected names of layers in `{argument}`, such as {known[:3]}, got {name!r}")
