"""A trial run of a compressed model: it must do what the dense model does with the reconstructed weights."""

import traceback
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call, said
from tenzoo.compression.outputs import difference
from tenzoo.compression.progress import LOGGER
from tenzoo.compression.replaceable import Weight, described, named_modules
from tenzoo.compression.runs import evaluating, repeatably
from tenzoo.layers import TensorizedLayer

_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}
"""How far apart outputs may be that differ in the order of additions only, relative to their size."""


def try_model(
    model: nn.Module,
    weights: Sequence[Weight],
    call: Call,
    argument: str,
    outputs: Sequence[Tensor],
    varies: float | None,
) -> None:
    """Run a compressed model once, and compare its outputs.

    Args:
        model: The model, with its layers replaced.
        weights: The weights that were replaced.
        call: The input.
        argument: The argument that the input came from.
        outputs: The outputs of the dense model with the weights that the cores reconstruct.
        varies: How far apart the outputs of two runs are; None if they cannot be compared.

    Raises:
        ValueError: If the model does not run, calls a layer that was replaced, or has other outputs.
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
            f"expected a model that does with cores what it does with the dense weights that they reconstruct, got "
            f"outputs on `{argument}` that are {apart:.2g} of their size apart; a module that asks for the exact class "
            f"of a layer, as type(layer) is nn.Linear does, treats one made of cores otherwise: exclude it from plan()"
        )


def _where(model: nn.Module, error: BaseException) -> str:
    """The module and the line of a model where an error arose, and the layers in it that are made of cores."""
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
    return (
        f" in {described(names[reader], reader)} ({place}), which has the layers {full[:3]} of cores; exclude "
        f"them from plan()"
    )
