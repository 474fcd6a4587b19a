"""What the layers of a model see: how much of it, how it varies, and what comes of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tenzoo.layers import TensorizedLayer

Example: TypeAlias = Tensor | tuple[Any, ...]
"""The argument of a model's forward pass, or all of them."""

_RIDGE = 1e-2
"""What is added to the second moments of each mode, whose mean is 1: an input that never varied may still come to."""

_IMAGES = 8
"""Images whose patches are held at a time."""


def count_positions(model: nn.Module, layers: Mapping[str, TensorizedLayer[Any]], example: Example) -> dict[str, int]:
    """Rows, pixels or indices that each layer sees in a forward pass in evaluation mode, all of its calls together.

    Args:
        model: Stays as it is.
        layers: By the names of the model's layers, their counterparts.
        example: An input of the model, the argument ``example_input`` of the caller.

    Raises:
        ValueError: If the model does not take the input.
    """
    seen: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        seen[name] = seen.get(name, 0) + layers[name].positions(x)

    _watch(model, layers, example, "example_input", note)
    return seen


def input_metrics(
    model: nn.Module, layers: Mapping[str, TensorizedLayer[Any]], example: Example
) -> dict[str, dict[int, Tensor]]:
    """In which metric a change of a layer's weight is the change of its outputs, as far as single modes tell.

    If the patches x that the weight of a layer is multiplied by have the second moments ``C = E[x xᵀ]``, a change D of
    the weight changes the outputs by ``E‖D x‖² = ‖D C^{1/2}‖²``. C is taken for the Kronecker product of its parts for
    the single modes, ``C_k``, and ``S_k = C_k^{1/2}`` is the metric of the mode k, but for its scale.

    Args:
        model: Stays as it is; it is run in evaluation mode.
        layers: By the names of the model's layers, their counterparts.
        example: An input of the model, the more of it the better, the argument ``calibration`` of the caller.

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
                moment = (rows @ rows.t()).double()
                own[first + k - 1] = own[first + k - 1] + moment if first + k - 1 in own else moment

    _watch(model, layers, example, "calibration", note)
    return {name: {mode: _root(moment) for mode, moment in own.items()} for name, own in moments.items()}


def _root(moment: Tensor) -> Tensor:
    mean = moment.diagonal().mean()
    values, vectors = torch.linalg.eigh(moment / mean if mean > 0 else moment)
    root: Tensor = (vectors * (values.clamp_(min=0) + _RIDGE).sqrt()) @ vectors.t()
    return root


def sensitivities(model: nn.Module, changed: Mapping[str, tuple[Tensor, float]], example: Example) -> dict[str, float]:
    """How far the outputs of a model move, relative to their size, per squared relative error of single weights.

    Args:
        model: Stays as it is; it is run in evaluation mode, once for each weight.
        changed: By the names of parameters, what is put in their places, and its squared relative error.
        example: An input of the model, the argument ``calibration`` of the caller.

    Returns:
        ``‖y' − y‖² / (‖y‖² e²)`` by name, y being all outputs together.
    """
    with _evaluating(model):
        before = _outputs(run(model, example, "calibration"))
        size = sum(float(y.square().sum()) for y in before)
        found: dict[str, float] = {}
        for name, (weight, error) in changed.items():
            path, _, key = name.rpartition(".")
            parameter = model.get_submodule(path)._parameters[key]
            assert parameter is not None
            kept = parameter.detach().clone()
            try:
                parameter.copy_(weight)
                after = _outputs(run(model, example, "calibration"))
            finally:
                parameter.copy_(kept)
            moved = sum(float((y - x).square().sum()) for x, y in zip(before, after, strict=True))
            found[name] = moved / (size * error) if size else 1.0
    return found


def check_example(example: object, argument: str) -> None:
    """Refuse what is no input: something without tensors, without numbers, or with NaN or infinity in it.

    Raises:
        TypeError: If it is neither a tensor nor a tuple.
        ValueError: If a tensor is empty, or not finite.

    Example:
        >>> check_example([1, 2], "calibration")
        Traceback (most recent call last):
        ...
        TypeError: expected a tensor, or a tuple of the arguments of the model, in `calibration`, got a list
    """
    if not isinstance(example, Tensor | tuple):
        raise TypeError(
            f"expected a tensor, or a tuple of the arguments of the model, in `{argument}`, got a "
            f"{type(example).__name__}"
        )
    if isinstance(example, tuple) and not example:
        raise ValueError(f"expected the arguments of the model in `{argument}`, got none")
    for x in example if isinstance(example, tuple) else (example,):
        if isinstance(x, Tensor) and x.numel() == 0:
            raise ValueError(
                f"expected inputs with numbers in `{argument}`, got an empty one of shape {tuple(x.shape)}"
            )
        if isinstance(x, Tensor) and x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise ValueError(f"expected finite numbers in `{argument}`, got NaN or infinity")


def run(model: nn.Module, example: Example, argument: str) -> Any:
    """What a model makes of an input.

    Args:
        model: In the mode it is to run in.
        example: Its argument, or a tuple of all of them.
        argument: Where the input came from.

    Raises:
        ValueError: If the model does not take the input.

    Example:
        >>> run(nn.Linear(3, 2), torch.ones(4, 5), "calibration")
        Traceback (most recent call last):
        ...
        ValueError: expected an input of the model in `calibration`, got a tensor of shape (4, 5) and float32, with \
which it fails: RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x5 and 3x2)
    """
    inputs = example if isinstance(example, tuple) else (example,)
    try:
        return model(*inputs)
    except MemoryError:
        raise
    except Exception as error:
        given = " and ".join(
            f"a tensor of shape {tuple(x.shape)} and {str(x.dtype).removeprefix('torch.')}"
            if isinstance(x, Tensor)
            else f"a {type(x).__name__}"
            for x in inputs
        )
        said = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"expected an input of the model in `{argument}`, got {given}, with which it fails: "
            f"{type(error).__name__}: {said}"
        ) from error


def _outputs(result: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf.double() for leaf in leaves]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _watch(
    model: nn.Module,
    layers: Mapping[str, Any],
    example: Example,
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
        with _evaluating(model):
            run(model, example, argument)
    finally:
        for handle in handles:
            handle.remove()
