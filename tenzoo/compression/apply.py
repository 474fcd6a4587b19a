"""Applying a plan: the layers of a model are replaced."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from tenzoo.compression.calls import Call, hold_back
from tenzoo.compression.decompositions import dense_weights
from tenzoo.compression.fingerprint import fingerprint
from tenzoo.compression.inputs import check_seen, observe
from tenzoo.compression.matching import check_plan, matched, settings_of
from tenzoo.compression.metrics import output_metrics
from tenzoo.compression.outputs import repeated_outputs
from tenzoo.compression.plans import LayerPlan, Plan
from tenzoo.compression.progress import each
from tenzoo.compression.reading import Example, read_call, read_calls
from tenzoo.compression.replace import put_in_place
from tenzoo.compression.replaceable import Replacement, Weight
from tenzoo.compression.samples import divider
from tenzoo.compression.trial import try_model
from tenzoo.factorizations.decomposition import full_precision
from tenzoo.layers import TensorizedLayer

M = TypeVar("M", bound=nn.Module)


@full_precision()
def apply_(model: M, plan: Plan, *, example_input: Example | None = None, calibration: Example | None = None) -> M:
    """Replace the layers of a model by layers with cores, in place.

    The cores are copies of those that the plan decomposed, if the model has the planned weights, bit for bit. Otherwise
    all layers are decomposed before the first one is replaced, as with a plan from a file. With an input the compressed
    model is run once and compared with the dense model whose weights are reconstructed from the cores. If anything
    fails, the model stays as it was. An autocast around the call has no effect.

    A layer that has several names is replaced under each, also where other code reads its ``weight``. A weight of
    attention and recurrent layers, which no layer can replace, becomes a :class:`~tenzoo.layers.TensorizedWeight`, a
    parametrization of torch. Such a model cannot be pickled as a whole; save its plan and its state dict instead (see
    :func:`~tenzoo.compression.restore_`). Frozen weights stay frozen, and biases stay the same parameters. Cores are
    new parameters: make an optimizer, or an average of weights, after this call.

    Args:
        model: The model that was planned, or another with the same layers and as many parameters.
        plan: A plan from :func:`~tenzoo.compression.plan`.
        example_input: An input for the trial run, in any of the forms of :mod:`~tenzoo.compression.reading`; not needed
            with calibration data.
        calibration: The inputs that the plan was made with, if it was, in the same forms.

    Returns:
        The model itself.

    Raises:
        TypeError: If ``plan`` is no plan, or an input is of another type.
        ValueError: If the plan was made with calibration data and there are none here, or others, or the reverse. If
            the model does not take the inputs, or they are empty or not finite. If a planned layer is missing, is of
            another class or shape, or cannot be replaced. If a number of the plan is not that of the model. If the
            model does not run with its layers replaced, or has other outputs.
        MemoryError: As :func:`~tenzoo.compression.plan`.

    Example:
        >>> from tenzoo.compression import plan
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> apply_(model, plan(model, factorization="tt", ranks={"0": 8}))[0].factorization.rank
        (8,)
    """
    check_plan(plan)
    example, calls = _inputs(model, plan, example_input, calibration)
    pairs = matched(model, plan)
    weights = [weight for weight, _ in pairs]
    decompositions = plan.decompositions
    if decompositions is not None and decompositions.fit(model):  # the plan has run it on these calls
        replacements = decompositions.copies(weights)
    else:
        if calls:
            check_seen(weights, observe(model, weights, calls, "calibration"))
        replacements = _decomposed(model, plan, pairs, calls)
    argument, trial = ("calibration", next(iter(calls), None)) if example is None else ("example_input", example)
    if trial is None:
        with put_in_place(model, plan, replacements):
            return model
    expected, varies = repeated_outputs(model, dense_weights(replacements), trial, argument)
    with put_in_place(model, plan, replacements):
        try_model(model, weights, trial, argument, expected, varies)
    return model


def _inputs(
    model: nn.Module, plan: Plan, example_input: Example | None, calibration: Example | None
) -> tuple[Call | None, list[Call]]:
    """The example, and the calibration data that the plan was made with."""
    if plan.data_aware != (calibration is not None):
        made_with, given = ("with", "none") if plan.data_aware else ("without", "some")
        raise ValueError(f"expected `calibration` data as in `plan`, which was made {made_with} them, got {given}")
    example = None if example_input is None else read_call(example_input, "example_input", model)
    calls = [] if calibration is None else read_calls(calibration, "calibration", model, divider(model))
    if calls and plan.calibration not in (None, fingerprint(calls)):
        raise ValueError(
            "expected the `calibration` data that `plan` was made with, got others; give both the same, which a "
            "DataLoader that shuffles or augments does not"
        )
    return example, calls


def _decomposed(
    model: nn.Module, plan: Plan, pairs: Sequence[tuple[Weight, LayerPlan]], calls: Sequence[Call]
) -> list[tuple[Weight, Replacement]]:
    """The weights with replacements that are decomposed as planned."""
    metrics: Mapping[str, Mapping[int, Tensor]] = {}
    if plan.by_outputs:
        empty = {weight.name: weight.empty(**settings_of(layer)) for weight, layer in pairs}
        layers = {name: layer for name, layer in empty.items() if isinstance(layer, TensorizedLayer)}
        metrics = output_metrics(model, layers, hold_back(calls, divider(model))[0])
    return [
        (weight, weight.decomposed(**settings_of(layer), metric=metrics.get(weight.name)))
        for weight, layer in each(pairs, "decomposing layers")
    ]
