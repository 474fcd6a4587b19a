"""Carrying out a plan, and going back."""

import copy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call, fingerprint, hold_back, said
from tenzoo.compression.inputs import check_seen, input_metrics, observe
from tenzoo.compression.matching import check_plan, matched, read_by_another, settings_of
from tenzoo.compression.outputs import difference, repeated_outputs
from tenzoo.compression.plans import LayerPlan, Plan
from tenzoo.compression.progress import LOGGER, each
from tenzoo.compression.readers import described
from tenzoo.compression.reading import Example, read_call, read_calls
from tenzoo.compression.replaceable import (
    Weight,
    check_module,
    named_modules,
    not_foldable,
    put_parametrization,
    take_parametrization,
)
from tenzoo.compression.runs import evaluating, repeatably
from tenzoo.compression.samples import divider
from tenzoo.factorizations.decomposition import full_precision
from tenzoo.layers import TensorizedLayer, TensorizedWeight
from tenzoo.state_dicts import kind_differences, lost_values, shape_differences, tensors_of

M = TypeVar("M", bound=nn.Module)

_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}
"""How far apart outputs may be that differ in the order of additions only, relative to their size."""


@full_precision()
def apply_(model: M, plan: Plan, *, example_input: Example | None = None, calibration: Example | None = None) -> M:
    """Replace the layers of a model by layers made of cores, in place.

    All layers are decomposed before the first one is replaced, and with an input the model is run once before it is
    given out, and compared with the dense one whose weights are rebuilt from the cores: if anything fails, the model
    stays as it was. An autocast around the call has no effect on it. A layer that is reached under several names is
    replaced under each; a weight of attention and recurrent layers, which read it by name, and any other matrix that a
    module reads from one of its layers, becomes a :class:`~tenzoo.layers.TensorizedWeight`, a parametrization of torch:
    such a model cannot be pickled whole, and is saved by its plan and its state dict (see :func:`restore_`). Frozen
    weights stay frozen, and biases are the parameters that they were. Cores are new parameters: an optimizer, or an
    average of weights, is made after them.

    Without an input, what reads a weight from outside of its layer is known as far as the code of the model's classes
    tells (see :func:`~tenzoo.compression.readers.readers_in_code`).

    Args:
        model: The one that was planned, or another with the same layers and as many parameters.
        plan: From :func:`~tenzoo.compression.plan`.
        example_input: An input that the compressed model is to be run with once, in any of the forms of
            :mod:`~tenzoo.compression.reading`; with calibration data it is not needed.
        calibration: The inputs that the plan was made with, if it was, in the same forms.

    Returns:
        The model itself.

    Raises:
        TypeError: If ``plan`` is no plan, or an input none.
        ValueError: If the plan was made with calibration data and there are none here, or others, or the reverse; if
            the model does not take the inputs, or they are empty or not finite; if a planned layer is missing, is of
            another class or shape, or cannot be replaced; if a number of the plan is not that of the model; if the
            model does not run with its layers replaced, or does something else.
        MemoryError: As :func:`~tenzoo.compression.plan`.

    Example:
        >>> from tenzoo.compression import plan
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> apply_(model, plan(model, factorization="tt", ranks={"0": 8}))[0].weight.rank
        (8,)
    """
    check_plan(plan)
    if plan.data_aware != (calibration is not None):
        made_with, given = ("with", "none") if plan.data_aware else ("without", "some")
        raise ValueError(f"expected `calibration` data as in `plan`, which was made {made_with} them, got {given}")
    trial = None if example_input is None else read_call(example_input, "example_input", model)
    divide = divider(model)
    calls = [] if calibration is None else read_calls(calibration, "calibration", model, divide)
    if calls and plan.calibration not in (None, fingerprint(calls)):
        raise ValueError(
            "expected the `calibration` data that `plan` was made with, got others; give both the same, which a "
            "DataLoader that shuffles or augments does not"
        )
    pairs = matched(model, plan)
    argument = "example_input" if trial else "calibration"
    trial = trial or next(iter(calls), None)
    if trial:
        uses = observe(model, [weight for weight, _ in pairs], [trial, *calls], argument)
        for weight, _ in pairs:
            if weight.is_layer and weight.full_name in uses.readers:
                raise read_by_another(weight.name, uses.readers[weight.full_name])
        if calls:
            check_seen([weight for weight, _ in pairs], uses)
    metrics: Mapping[str, Mapping[int, Tensor]] = {}
    if plan.by_outputs:
        empty = {weight.name: weight.empty(**settings_of(layer)) for weight, layer in pairs}
        layers = {name: made for name, made in empty.items() if isinstance(made, TensorizedLayer)}
        metrics = input_metrics(model, layers, hold_back(calls, divide)[0])
    made = [
        (weight, _decomposed(weight, layer, metrics.get(weight.name)))
        for weight, layer in each(pairs, "replacing layers")
    ]
    _hold_budget(plan, made)
    if trial is None:
        with _put(model, made):
            return model
    with torch.no_grad():
        rebuilt = {weight.full_name: new.dense_weight() for weight, new in made}
    expected, varies = repeated_outputs(model, rebuilt.items(), trial, argument)
    with _put(model, made):
        _try(model, [weight for weight, _ in pairs], trial, argument, expected, varies)
    return model


def restore_(model: M, plan: Plan, weights: Mapping[str, Tensor]) -> M:
    """Give a dense model the cores that a plan has made of it before, in place, without decomposing anything.

    Args:
        model: Of the class and the sizes that were planned; its numbers do not matter. What is on the meta device gets
            memory where the weights are.
        plan: That was carried out.
        weights: The state dict of the model that :func:`apply_` made, trained further or not.

    Returns:
        The model itself.

    Raises:
        TypeError: If ``plan`` is no plan, or ``weights`` no mapping to tensors.
        ValueError: As :func:`apply_`, or if the weights are not those of this model under this plan.

    Example:
        >>> from tenzoo.compression import plan
        >>> model, other = (nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)) for _ in range(2))
        >>> made = plan(model, factorization="tt", ranks=8)
        >>> weights = apply_(model, made).state_dict()
        >>> restore_(other, made, weights)[0].weight.cores[0].equal(model[0].weight.cores[0])
        True
    """
    check_plan(plan)
    pairs = matched(model, plan)
    if not isinstance(weights, Mapping):
        raise TypeError(f"expected a state dict in `weights`, got a {type(weights).__name__}")
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"expected tensors in `weights`, got a {type(value).__name__} as {name!r}")
    inner: nn.Module = getattr(model, "_orig_mod", model)
    weights = {name.removeprefix("_orig_mod."): value for name, value in weights.items()}
    # A copy without memory tells whether the weights fit before anything is replaced.
    skeleton = copy.deepcopy(inner).to("meta")
    with _put(
        skeleton,
        [(weight, weight.empty(**settings_of(layer))) for weight, layer in matched(skeleton, plan, numbers=False)],
    ):
        pass
    _check_weights(inner, tensors_of(skeleton), weights)
    device = next((value.device for value in weights.values()), torch.device("cpu"))
    made = []
    for weight, layer in pairs:
        own = device if weight.dense.is_meta else weight.dense.device
        new = weight.empty(**settings_of(layer)).to_empty(device=own).train(weight.owner.training)
        new.weight.requires_grad_(weight.trained)
        made.append((weight, new))
    _hold_budget(plan, made)
    with _put(inner, made):
        for name, valid, given in lost_values(inner, weights):
            raise ValueError(f"expected {valid} as {name!r} in `weights`, got {given}")
        _give_memory(inner, device)
        inner.load_state_dict(weights)
    return model


def fold_(model: M) -> M:
    """Replace all layers that are made of cores by the dense layers of torch that compute the same, in place.

    Args:
        model: Any module.

    Returns:
        The model itself.

    Raises:
        ValueError: If the model itself is a tensorized layer: take its :meth:`to_dense`. If a weight that is made of
            cores is parametrized in another way as well. If a tensorized layer does more than the dense one would: it
            has hooks, a forward pass, parameters or modules of its own, or a plain attribute leads to it.

    Example:
        >>> from tenzoo.layers import TensorizedLinear
        >>> fold_(nn.Sequential(TensorizedLinear(8, 4, factorization="cp", rank=2)))
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    check_module(model)
    if isinstance(model, TensorizedLayer):
        raise ValueError(f"expected a model with tensorized layers in it, got a {type(model).__name__}; see to_dense()")
    made = [
        (owner, name, f"{path}.{name}".lstrip("."), len(chain))
        for path, owner in named_modules(model)
        for name, chain in getattr(owner, "parametrizations", {}).items()
        if any(isinstance(part, TensorizedWeight) for part in chain)
    ]
    for _, _, full, length in made:
        if length > 1:
            raise ValueError(
                f"expected weights that are made of cores alone in `model`, got {full!r} with {length - 1} more "
                f"parametrizations; remove them first"
            )
    for name, dense, reason in not_foldable(model):
        raise ValueError(
            f"expected cores that a {dense} can take the place of in `model`, got {name!r}, which {reason}"
        )
    for owner, name, _, _ in reversed(made):
        take_parametrization(owner, name)
    folded: dict[nn.Module, nn.Module] = {}
    weights: dict[tuple[nn.Module, torch.Size], nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, TensorizedLayer):
            dense = folded[module] = module.to_dense()
            _hand_on_bias(module, dense)
            dense.weight = weights.setdefault((module.weight, dense.weight.shape), dense.weight)  # cores may be shared
    return _replaced(model, folded)


def _check_weights(model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse a state dict that is not that of the compressed model, or not all of its numbers."""
    expected = "expected weights of the compressed model in `weights`, got"
    for name, mine, other in shape_differences(own, weights):
        raise ValueError(f"{expected} {name!r} of shape {other} where the plan has {mine}")
    for name, kind, given in kind_differences(own, weights):
        raise ValueError(f"{expected} {name!r} as {given} where the model has {kind}")
    for name, value in weights.items():
        if value.is_meta:
            raise ValueError(f"{expected} {name!r} on the meta device, without numbers")
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in weights:
            raise ValueError(
                f"expected a model with numbers in the buffers that its state dict leaves out, got {name!r} on the "
                f"meta device in `model`; make it on another device"
            )


def _give_memory(model: nn.Module, device: torch.device) -> None:
    """Memory on a device for what is on the meta device, shared where it was."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is None or not value.is_meta:
                continue
            if id(value) not in made:
                empty = torch.empty_like(value, device=device)
                is_parameter = isinstance(value, nn.Parameter)
                made[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
            setattr(module, key, made[id(value)])


def _decomposed(
    weight: Weight, planned: LayerPlan, metric: Mapping[int, Tensor] | None
) -> TensorizedLayer[Any] | TensorizedWeight:
    made = weight.decomposed(**settings_of(planned), metric=metric)
    if not all(bool(core.isfinite().all()) for core in made.weight.cores):
        raise ValueError(f"expected a decomposition of {weight.name!r} into finite numbers, got NaN or infinity")
    return made


def _hold_budget(plan: Plan, made: Sequence[tuple[Weight, nn.Module]]) -> None:
    """Have layers multiply as few numbers as planned in any batch, and not as many as are quick."""
    planned = {layer.name: layer for layer in plan.layers}
    for weight, new in made:
        number, dense = planned[weight.name].multiplications, planned[weight.name].dense_multiplications
        if plan.counts == "multiplications" and isinstance(new, TensorizedLayer) and (number or 0) < (dense or 0):
            new.implementation = "contract"


@contextmanager
def _put(model: nn.Module, made: Sequence[tuple[Weight, nn.Module]]) -> Iterator[None]:
    """Put layers and parametrizations in their places; if what is done then fails, all is as it was before."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    owners = {weight.owner for weight, new in made if isinstance(new, TensorizedWeight)}
    parameters = [(owner, type(owner), dict(owner._parameters)) for owner in owners]
    try:
        for weight, new in made:
            if isinstance(new, TensorizedWeight):
                put_parametrization(weight.owner, weight.parameter, new)
            else:
                _hand_on_bias(weight.owner, new)
        _replaced(model, {weight.owner: new for weight, new in made if weight.is_layer})
        yield
    except BaseException:
        for module, own in children:
            _set(module._modules, own)
        for owner, kind, dense in parameters:
            for name in dense.keys() & vars(kind).keys():  # properties that were added to the class it had
                delattr(kind, name)
            owner.__class__ = kind
            _set(owner._parameters, dense)
            if isinstance(owner, nn.RNNBase):
                owner._init_flat_weights()
        raise


def _hand_on_bias(old: nn.Module, new: nn.Module) -> None:
    """Let a layer have the very bias of the one that it replaces: another may share it, or a hook may hang on it."""
    if isinstance(bias := old._parameters.get("bias"), nn.Parameter):
        new.bias = bias


def _set(place: dict[str, Any], content: Mapping[str, Any]) -> None:
    place.clear()
    place.update(content)


def _try(
    model: nn.Module,
    weights: Sequence[Weight],
    call: Call,
    argument: str,
    outputs: Sequence[Tensor],
    varies: float | None,
) -> None:
    """Run a compressed model once.

    Args:
        model: In which the layers are replaced.
        weights: What was there before.
        call: With the argument of this name.
        argument: Where the input came from.
        outputs: Of the dense model with the weights that the cores make.
        varies: How far apart those of two runs are; None if they cannot be compared.

    Raises:
        ValueError: If it does not run, calls a layer that was replaced, or has other outputs.
    """
    names = {weight.owner: weight.name for weight in weights if weight.is_layer}
    called: list[str] = []
    handles = [owner.register_forward_pre_hook(lambda dense, _: called.append(names[dense])) for owner in names]
    expected = f"expected a model that runs on `{argument}` with its layers made of cores, got"
    LOGGER.info("running the compressed model once")
    failed = None
    try:
        with evaluating(model):
            result = repeatably(model, call, argument)
    except ValueError as error:
        cause = error.__cause__ or error
        failed = f"{expected} {said(cause)}{_where(model, cause)}"
    finally:
        for handle in handles:
            handle.remove()
    if failed:  # without its cause, which would put the blame on code that runs with the dense model
        raise ValueError(failed)
    if called:
        raise ValueError(f"{expected} a call of the dense {called[0]!r}, which is held outside of the model's modules")
    apart = None if varies is None else difference(result, outputs)
    if apart is None and weights:
        LOGGER.warning("the outputs on `%s` cannot be compared with those of the dense weights", argument)
    rounding = max((_ROUNDING.get(weight.dense.dtype, 0.3) for weight in weights), default=0.0)
    if apart is not None and apart > max(rounding, 10 * (varies or 0.0)):
        raise ValueError(
            f"expected a model that does with cores what it does with the dense weights that they make, got outputs on "
            f"`{argument}` that are {apart:.2g} of their size apart; a module that asks for the class of a layer, as "
            f"isinstance(layer, nn.Linear) does, treats one made of cores otherwise: `exclude` it from plan()"
        )


def _where(model: nn.Module, error: BaseException) -> str:
    """In which module of a model an error arose, at which line, and which of its layers are made of cores."""
    names = {module: name for name, module in named_modules(model) if not isinstance(module, TensorizedLayer)}
    reader, place = None, ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module) and caller in names and not frame.f_globals["__name__"].startswith("torch.nn"):
            reader, place = caller, f"{frame.f_code.co_filename}:{line}"
    if reader is None:
        return ""
    layers = [name for name, child in named_modules(reader) if isinstance(child, TensorizedLayer)]
    full = [f"{names[reader]}.{name}" if names[reader] else name for name in layers]
    return f" in {described(names[reader], reader)} ({place}), whose layers {full[:3]} are; exclude what it reads"


def _replaced(model: M, made: Mapping[nn.Module, nn.Module]) -> M:
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and child in made:
                parent._modules[key] = made[child]
    return model
