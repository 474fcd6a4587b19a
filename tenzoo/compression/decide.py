"""From a trained network to a plan: which ranks are worth their cores."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call, fingerprint, hold_back, take
from tenzoo.compression.candidates import Candidate, allocate, rank_errors
from tenzoo.compression.inputs import check_seen, count_positions, input_metrics, observe
from tenzoo.compression.obstacles import multiplied, obstacles
from tenzoo.compression.outputs import dense_outputs, output_error, sensitivities
from tenzoo.compression.plans import LayerPlan, Plan
from tenzoo.compression.progress import LOGGER, each
from tenzoo.compression.reading import Example, read_call, read_calls
from tenzoo.compression.replaceable import Weight, find_weights, has_counterpart, own_parameters
from tenzoo.compression.samples import divider
from tenzoo.factorizations import Rank, factorization_class
from tenzoo.factorizations.decomposition import full_precision, multiply_modes, relative_norm, scaled_to_safety
from tenzoo.layers import TensorizedLayer, TensorizedWeight
from tenzoo.layers.cost import Positions

Budgeted: TypeAlias = Literal["parameters", "multiplications"]
"""What a budget counts."""

_TRIED_ERROR = 0.2
"""Relative error of the weights with which the sensitivity of the outputs is measured."""

_WEIGHED = 64
"""Samples that the sensitivities are measured with: only their square roots count."""

_LARGE = 2**30
"""Samples of a batch so large that what is done once in a call counts for nothing."""

_COUNTED = 32
"""How many candidates of a layer have their multiplications counted."""


@full_precision()
def plan(
    model: nn.Module,
    *,
    factorization: str,
    budget: float | None = None,
    ranks: Rank | Mapping[str, Rank] | None = None,
    count: Budgeted = "parameters",
    example_input: Example | None = None,
    calibration: Example | None = None,
    exclude: Sequence[str] = (),
) -> Plan:
    """Decide what each layer of a trained network becomes, without changing it.

    With a budget, ranks are chosen for the whole network at once. A layer with the relative error ``e = ‖W − Ŵ‖ / ‖W‖``
    is taken to keep the share ``1 − e²`` of its signal, and to add noise of the share ``e²``. A parameter goes where it
    takes most from the sum of all layers' noise-to-signal ratios ``e² / (1 − e²)``, so that no layer is given up for
    the others. With calibration data it goes where it adds most to the logarithm of the signal that the network
    keeps, ``Σ s · log(1 − e²)``, weighted by how sensitive its outputs are to each layer. A layer that is not worth its
    cores stays dense, and the network never gets larger than the budget.

    Convolutions are decomposed with whole modes, as ``(O, k_h k_w, I)``, and linear layers and embeddings as matrices;
    a block tensor train splits its modes as the layer does by default. An autocast around the call has no effect on it.

    Args:
        model: Any module; it keeps its weights and its mode.
        factorization: ``"cp"``, ``"tucker"``, ``"tt"``, ``"tr"`` or ``"btt"``.
        budget: A float in (0, 1] is the fraction of what the whole network has, an int an absolute number below that.
        ranks: Instead of a budget: one rank for all layers, or a mapping from names of layers to ranks, where the
            layers it leaves out stay dense. A layer stays dense if it would not get smaller, or if rank one is more
            than one fraction for all layers allows.
        count: What the budget counts; ``"multiplications"`` are those of the planned layers for one sample of
            ``example_input``, of how many it has: its first tensor's first size. They are those of a large batch, in
            which what is done once in a call counts for nothing. With such a budget layers are contracted with their
            cores, also where their dense weight would be quicker. Weights that stay parameters, such as those of
            recurrent layers, are rebuilt, which saves none.
        example_input: What the model is called with, in any of the forms of :mod:`~tenzoo.compression.reading`: a
            tensor, a tuple or list of arguments, a mapping of them by name, or a ``DataLoader``, whose first batch is
            taken; needed to count multiplications.
        calibration: Inputs of the kind the model will see, without labels, in the same forms; some 100 images will do,
            and of a ``DataLoader`` the first 128 samples are taken. The errors are then those of each layer's outputs
            on them and not those of its weight, as far as :func:`~tenzoo.compression.inputs.input_metrics` goes, in the
            choice of ranks and in the decompositions. Embeddings, which multiply nothing, and the weights of attention
            and recurrent layers, whose inputs are not seen, keep the error of the weight; their sensitivity counts all
            the same. A quarter of the samples is held back, where the network tells them apart: of this plan and of the
            one without the inputs the better is given, by the error of the network's own outputs on them.
        exclude: Names of layers that stay dense; that of an attention or recurrent layer stands for all its weights.

    Returns:
        The plan, with the errors of the decompositions that :func:`~tenzoo.compression.apply_` will make.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a name is not that of a layer, a rank does not fit, the budget cannot be met, or not exactly one
            of ``budget`` and ``ranks`` is given.
        MemoryError: If a decomposition would take more than 8 GiB beside its weight; how much it takes is stated with
            :meth:`~tenzoo.factorizations.Factorization.decompose`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3))
        >>> made = plan(model, factorization="tucker", budget=0.5)
        >>> made.parameters <= 0.5 * made.dense_parameters
        True
    """
    factorization_class(factorization)
    if count not in get_args(Budgeted):
        raise ValueError(f"expected one of {list(get_args(Budgeted))} in `count`, got {count!r}")
    if (budget is None) == (ranks is None):
        raise ValueError(f"expected one of `budget` and `ranks`, got budget={budget!r} and ranks={ranks!r}")
    if count == "multiplications" and example_input is None:
        raise ValueError("expected an `example_input` to count multiplications for, got None")
    weights = find_weights(model)  # before anything is run
    if not weights:
        raise ValueError(
            "expected convolutions, linear, attention or recurrent layers or embeddings in `model`, got "
            f"{type(model).__name__} without any (those of quantized networks have no parameters; quantize after)"
        )
    divide = divider(model)
    example = None if example_input is None else read_call(example_input, "example_input", model)
    calls = [] if calibration is None else read_calls(calibration, "calibration", model, divide)
    told = fingerprint(calls)
    for weight in weights:
        if weight.dense.is_meta:
            raise ValueError(f"expected numbers in `model`, got {weight.full_name!r} on the meta device")
        if weight.reason is None and not bool(torch.isfinite(weight.dense).all()):
            raise ValueError(f"expected finite weights in `model`, got NaN or infinity in {weight.full_name!r}")
    if calls or example is not None:
        uses = observe(model, weights, calls or [cast(Call, example)], "calibration" if calls else "example_input")
        weights = find_weights(model, read=uses.readers)
    _check_names(exclude, weights, "exclude")
    options = [
        _Option(weight, factorization, weight.name in exclude or weight.module_name in exclude) for weight in weights
    ]
    if calls:
        wanted = ranks if isinstance(ranks, Mapping) else [weight.name for weight in weights]
        check_seen([option.weight for option in options if not option.reason and option.weight.name in wanted], uses)
    layers = {
        option.weight.name: layer
        for option in options
        if has_counterpart(option.weight.owner) and isinstance(layer := option.thin, TensorizedLayer)
    }
    if example is not None:
        positions = count_positions(model, weights, layers, example)
        for option in options:
            option.positions = positions.get(option.weight.name)
    if isinstance(ranks, Mapping):
        _check_names(list(ranks), weights, "ranks")

    given = None if ranks is None else _given_ranks(options, ranks)
    if count == "parameters":
        whole = sum(parameter.numel() for parameter in model.parameters())
    else:
        whole = sum(option.dense_multiplications or 0 for option in options)
    allowed = None if budget is None else _checked_budget(budget, whole, count)

    def settled(options: Sequence[_Option]) -> tuple[Plan, dict[str, Tensor]]:
        if given is not None:
            return _settled(model, options, given)
        assert allowed is not None
        made, changed = _settled(model, options, _within(model, options, allowed, whole, count))
        return replace(made, counts=count), changed

    if not calls:
        return settled(options)[0]
    fitted, held = hold_back(calls, divide)
    smallest = given or _given_ranks(options, 1)
    open_ = {option.weight.name for option, rank in zip(options, smallest, strict=True) if rank is not None}
    metrics = input_metrics(model, {name: layer for name, layer in layers.items() if name in open_}, fitted)
    plain = [copy.copy(option) for option in options]  # before they know the inputs
    for option in options:
        option.metric = metrics.get(option.weight.name, {})
    if budget is not None:
        _weigh(model, options, list(take(fitted, _WEIGHED, divide)))
    found: list[Plan] = []
    expected = dense_outputs(model, held)
    ways: dict[Literal["weights", "outputs"], list[_Option]] = {"outputs": options, "weights": plain}
    for keeps, way in ways.items():
        made, changed = settled(way)
        error = output_error(model, changed.items(), held, expected)
        made = replace(made, data_aware=True, calibration=told, keeps=keeps, output_error=error)
        found.append(replace(made, held_back=held is not fitted))
    best = min(found, key=lambda made: cast(float, made.output_error))
    if math.isfinite(cast(float, best.output_error)):
        return best
    LOGGER.warning("the outputs of the network on `calibration` are not finite with these ranks; give it more")
    return replace(best, output_error=None)


def _given_ranks(options: Sequence["_Option"], ranks: Rank | Mapping[str, Rank]) -> list[Rank | None]:
    """A rank for each layer, None for a dense one."""
    chosen = [_given(option, ranks) for option in options]
    if _is_fraction(ranks) and not any(chosen) and not all(option.reason for option in options):
        raise ValueError(f"expected `ranks` that leave room for rank one in some layer, got {ranks!r}")
    return chosen


def _settled(
    model: nn.Module, options: Sequence["_Option"], chosen: Sequence[Rank | None]
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan for these ranks, and what the weights become, by the names of parameters."""
    owned = own_parameters([option.weight for option in options])
    changed: dict[str, Tensor] = {}
    planned = []
    for option, rank, own in each(list(zip(options, chosen, owned, strict=True)), "decomposing layers"):
        layer, weight = option.planned(rank, own)
        planned.append(layer)
        if weight is not None:
            changed[option.weight.full_name] = weight
    everything = sum(parameter.numel() for parameter in model.parameters())
    return Plan(tuple(planned), everything - sum(layer.dense_parameters for layer in planned)), changed


class _Option:
    """A layer, and how it would be made of cores."""

    def __init__(self, weight: Weight, factorization: str, excluded: bool) -> None:
        self.weight = weight
        self.factorization = factorization
        self.reason = "was excluded" if excluded else weight.reason
        self.positions: Positions | None = None
        self.metric: Mapping[int, Tensor] = {}
        self.importance: float | None = None
        """How far its error moves the outputs of the model; None if that was not measured."""

    @property
    def settings(self) -> dict[str, Any]:
        """How it would be made of cores, but for the rank."""
        rows, columns = self.weight.dense.shape[:2]
        whole = None if self.factorization == "btt" else ((rows,), (columns,))
        return {"factorization": self.factorization, "tensorization": whole}

    def empty(self, rank: Rank) -> TensorizedLayer[Any] | TensorizedWeight:
        """It with cores of these ranks, on the meta device."""
        return self.weight.empty(rank=rank, **self.settings)

    @cached_property
    def thin(self) -> TensorizedLayer[Any] | TensorizedWeight:
        """It with cores of rank one, on the meta device."""
        return self.empty(1)

    @cached_property
    def dense_multiplications(self) -> int | None:
        """For one sample; None if the example input does not reach the layer."""
        if self.positions is None:
            return None
        if isinstance(self.weight.owner, nn.Embedding):
            return 0
        if has_counterpart(self.weight.owner) and isinstance(self.thin, TensorizedLayer):
            return round(self.thin.costs.dense.growth(self.positions).products)
        return round(self.weight.dense.numel() * self.positions.outputs)

    def multiplications(self, layer: TensorizedLayer[Any] | TensorizedWeight) -> int | None:
        """For one sample in a large batch, as it would be computed with cores."""
        if self.positions is None or isinstance(layer, TensorizedWeight):
            return self.dense_multiplications
        if layer.costs.cheaper(self.positions.times(_LARGE), "kept", self.weight.dense.device.type) == "contract":
            return round(layer.costs.contract.growth(self.positions).products)
        return self.dense_multiplications

    def candidates(self, count: Budgeted) -> list[Candidate]:
        """Ways to store this weight, the dense one at the end."""
        if count == "parameters" and self.reason is not None:
            return [Candidate(None, 0, 0.0)]  # costs nothing that could be saved
        dense_cost = self.weight.dense.numel() if count == "parameters" else self.dense_multiplications or 0
        dense = Candidate(None, dense_cost, 0.0)
        if self.reason is not None or dense_cost == 0:
            return [dense]
        kind, shape = type(self.thin.weight), self.thin.weight.shape
        errors: Mapping[tuple[int, ...], float] = self.errors
        if count == "parameters":
            sizes = {rank: kind._count(shape, rank) for rank in errors}
        else:
            errors = _thinned(errors)
            sizes = {rank: self.multiplications(self.empty(rank)) or 0 for rank in errors}
        found = [
            Candidate(rank, sizes[rank], self.loss(error)) for rank, error in errors.items() if sizes[rank] < dense_cost
        ]
        return [*found, dense]

    def loss(self, error: float) -> float:
        """What a squared relative error takes from the whole model, as :func:`plan` says.

        Where the importance of a layer is not known, a large error has to count for more: the ratio of noise to signal
        grows faster than the logarithm.
        """
        kept = max(1 - error, 1e-12)
        return (1 - kept) / kept if self.importance is None else -self.importance * math.log(kept)

    @cached_property
    def errors(self) -> dict[tuple[int, ...], float]:
        """Squared relative errors by rank."""
        tensor, _ = scaled_to_safety(self.thin._tensorized(self.weight.dense))
        return rank_errors(multiply_modes(tensor, self.metric), type(self.thin.weight))

    def planned(self, rank: Rank | None, before: int) -> tuple[LayerPlan, Tensor | None]:
        """The plan for this layer of so many parameters, and its new weight; ``rank`` None is dense."""
        dense = self.weight.dense
        shape = tuple(dense.shape)
        kind = type(self.weight.owner).__name__
        if rank is None or self.reason is not None:
            reason = self.reason or "is not worth its cores"
            number = self.dense_multiplications
            return LayerPlan(
                self.weight.name, kind, shape, None, None, None, before, before, number, number, 0.0, reason
            ), None
        made = self.weight.decomposed(rank=rank, metric=self.metric, **self.settings)
        with torch.no_grad():
            weight = made.dense_weight()
            parts = (weight - dense, dense)
            error = relative_norm(*(multiply_modes(made._tensorized(part), self.metric) for part in parts))
        layer = LayerPlan(
            self.weight.name,
            kind,
            shape,
            self.factorization,
            made.weight.rank,
            made.tensorization,  # type: ignore[arg-type]
            before - dense.numel() + sum(core.numel() for core in made.weight.cores),
            before,
            self.multiplications(made),
            self.dense_multiplications,
            error,
            None,
        )
        return layer, weight


def _weigh(model: nn.Module, options: Sequence[_Option], calls: Sequence[Call]) -> None:
    """Let each layer's error count by how far it moves the outputs of the model.

    That is measured at one rank per layer, and depends on the rank; so the square root of it is taken, halfway, on a
    logarithmic scale, between what was measured and all layers alike.
    """
    changed: dict[str, tuple[Callable[[], Tensor], float]] = {}
    for option in each(options, "trying ranks of layers"):
        inexact = {} if option.reason else {rank: error for rank, error in option.errors.items() if error > 0}
        if inexact:
            rank = min(inexact, key=lambda rank: abs(math.sqrt(inexact[rank]) - _TRIED_ERROR))
            made = option.weight.decomposed(rank=rank, metric=option.metric, **option.settings)
            with torch.no_grad():
                changed[option.weight.full_name] = partial(torch.Tensor.detach, made.dense_weight()), inexact[rank]
    found = sensitivities(model, changed, calls)
    least = 1e-6 * max(found.values(), default=0.0)
    for option in options:
        if option.weight.full_name in found:
            option.importance = math.sqrt(max(found[option.weight.full_name], least)) or 1.0


def _within(
    model: nn.Module, options: Sequence[_Option], allowed: float, whole: int, count: Budgeted
) -> list[tuple[int, ...] | None]:
    candidates = [option.candidates(count) for option in each(options, "choosing ranks of layers")]
    fixed = whole - sum(row[-1].cost for row in candidates)
    try:
        return [choice.rank for choice in allocate(candidates, allowed - fixed)]
    except ValueError as error:
        stays = [
            (option.weight, option.reason, round(row[-1].cost))
            for option, row in zip(options, candidates, strict=True)
            if len(row) == 1
        ]
        least = math.ceil(fixed + sum(min(choice.cost for choice in row) for row in candidates))
        raise ValueError(
            f"expected at least {least:,} {count} in `budget`, the least that this model can be brought to, got "
            f"{math.floor(allowed):,} of {whole:,}; what stays as it is: "
            f"{obstacles(model, stays) if count == 'parameters' else multiplied(stays)}"
        ) from error


def _checked_budget(budget: float, whole: int, count: Budgeted) -> float:
    """How many parameters or multiplications there may be, of as many as the dense model has."""
    valid = "a float in (0, 1], a fraction, or an int >= 1, an absolute number,"
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(f"expected {valid} in `budget`, got {budget!r}")
    if isinstance(budget, Integral):
        if budget < 1:
            raise ValueError(f"expected {valid} in `budget`, got {budget!r}")
        if budget >= whole:
            raise ValueError(f"expected fewer {count} in `budget` than the {whole:,} of the model, got {budget:,}")
        return float(budget)
    if not 0 < budget <= 1:
        raise ValueError(f"expected {valid} in `budget`, got {budget!r}")
    return float(budget) * whole


def _given(option: _Option, ranks: Rank | Mapping[str, Rank]) -> Rank | None:
    if isinstance(ranks, Mapping):
        if option.weight.name not in ranks:
            option.reason = option.reason or "is not among the given ranks"
            return None
        if option.reason is not None:
            raise ValueError(
                f"expected ranks of layers that can be made of cores in `ranks`, got {option.weight.name!r}, which "
                f"{option.reason}"
            )
        rank = ranks[option.weight.name]
    elif option.reason is not None:
        return None
    else:
        rank = ranks
    try:
        thin = option.empty(rank).weight
    except (TypeError, ValueError) as error:
        if _is_fraction(ranks):
            return None  # not even rank one is so small
        message = str(error).replace("`rank`", "`ranks`")
        raise type(error)(f"{message} for {option.weight.name!r}") from error
    kind = type(thin)
    usable = kind._usable_rank(thin.shape, thin.rank)
    return usable if kind._count(thin.shape, usable) < option.weight.dense.numel() else None


def _is_fraction(ranks: object) -> bool:
    return isinstance(ranks, Real) and not isinstance(ranks, Integral) and 0 < ranks <= 1  # type: ignore[operator]


def _check_names(names: Sequence[str], weights: Sequence[Weight], argument: str) -> None:
    known = [weight.name for weight in weights]
    modules = {weight.module_name for weight in weights} if argument == "exclude" else set()
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"expected names of layers in `{argument}`, got {names!r}")
    for name in names:
        if name not in known and name not in modules:
            raise ValueError(f"expected names of layers in `{argument}`, such as {known[:3]}, got {name!r}")


def _thinned(errors: Mapping[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """Some of the ranks, at about equal ratios of their places, the first and the last among them."""
    ranks = list(errors)
    places = {round((len(ranks)) ** (k / (_COUNTED - 1))) - 1 for k in range(_COUNTED)}
    return {ranks[place]: errors[ranks[place]] for place in sorted(places)} if ranks else {}
