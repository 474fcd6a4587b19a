"""The forms of inputs that users have, and the calls of a model that they stand for.

======================================  =====================================================
an input                                is called as
======================================  =====================================================
a tensor ``x``                          ``model(x)``
a tuple or a list ``(a, b)``            ``model(a, b)``; None and nested values are passed on
a mapping ``{"a": a}``, such as what    ``model(a=a)``
a tokenizer returns
a ``DataLoader``                        one call for each of its batches, see :func:`read_calls`
a list of :class:`Call`                 these
======================================  =====================================================

A model whose only argument is a list or a mapping takes it in a tuple: ``([image, image],)``.

Samples are counted along the first size of the first tensor; the arguments are one sample if a list of tensors comes
first. They are divided only if the model confirms it: its outputs for the parts must be the parts of its outputs for
the whole.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tenzoo.compression.calls import Call, Divide, said, take

Example: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any] | DataLoader[Any]
"""The input of a model, or a ``DataLoader`` of inputs."""

SAMPLES = 128
"""Number of samples that are taken from a ``DataLoader``."""


def read_call(example: object, argument: str, model: nn.Module) -> Call:
    """One call of a model; the first batch of a ``DataLoader``.

    Args:
        example: The user's input.
        argument: The argument that the input came from, for the errors.
        model: The model whose signature tells inputs from labels in a ``DataLoader``.

    Raises:
        TypeError: As :func:`read_calls`.
        ValueError: As :func:`read_calls`.
    """
    return read_calls(example, argument, model, _whole, samples=1)[0]


def _whole(call: Call, border: int) -> None:
    """Divide no call."""


def read_calls(
    example: object, argument: str, model: nn.Module, divide: Divide, *, samples: int = SAMPLES
) -> list[Call]:
    """The calls of a model that an input stands for, checked.

    The batches of a ``DataLoader`` are taken in its order until there are enough samples. A batch is an input like any
    other, except for labels: of a tuple or list with more items than ``forward`` takes, the first ones are used, if
    ``forward`` has no optional arguments. If labels could be meant for an optional argument, the loader is refused.

    Args:
        example: The user's input.
        argument: The argument that the input came from, for the errors.
        model: The model whose signature tells inputs from labels in a ``DataLoader``.
        divide: Cuts the last batch of a ``DataLoader`` to the number of samples.
        samples: Number of samples from a ``DataLoader``; the size of a batch is that of its first tensor.

    Raises:
        TypeError: If the input has another form.
        ValueError: If there is no tensor, or one that is empty, not finite, sparse, or on the meta device; −inf is
            valid in a mask. If labels cannot be told from inputs.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.ones(300, 3), torch.zeros(300))
        >>> calls = read_calls(DataLoader(data, batch_size=64), "calibration", nn.Linear(3, 2), lambda *_: None)
        >>> [call.size for call in calls], len(calls[0].args)
        ([64, 64], 1)
    """
    if isinstance(example, list) and example and all(isinstance(call, Call) for call in example):
        calls: list[Call] = example
    elif isinstance(example, DataLoader):
        return read_batches(example, argument, model, divide, samples=samples)
    else:
        calls = [_call(example, argument)]
    return [_checked(call, argument) for call in calls]


def read_batches(
    batches: Iterable[object], argument: str, model: nn.Module, divide: Divide, *, samples: int = SAMPLES
) -> list[Call]:
    """The calls that batches stand for; arguments, errors and labels as with :func:`read_calls`."""
    read = (_checked(_of_batch(batch, argument, model), argument) for batch in batches)
    calls = list(take(read, samples, divide))
    if not calls:
        raise ValueError(f"expected batches of inputs in `{argument}`, got none")
    return calls


# --- one input -----------------------------------------------------------------------------------------------------


def _call(example: object, argument: str) -> Call:
    if isinstance(example, Tensor):
        return Call((example,), {})
    if isinstance(example, tuple | list):
        return Call(tuple(example), {})
    if isinstance(example, Mapping):
        if not all(isinstance(name, str) for name in example):
            raise TypeError(f"expected names of arguments in the mapping in `{argument}`, got {list(example)[:3]}")
        return Call((), dict(example))
    raise TypeError(
        f"expected a tensor, a tuple or list of the arguments of the model, a mapping of them by name, or a "
        f"DataLoader, in `{argument}`, got a {type(example).__name__}"
    )


def _checked(call: Call, argument: str) -> Call:
    if not call.args and not call.kwargs:
        raise ValueError(f"expected the arguments of the model in `{argument}`, got none")
    if not call.tensors:
        raise ValueError(f"expected a tensor in `{argument}`, got {call}")
    for x in call.tensors:
        if x.is_meta:
            raise ValueError(f"expected inputs with numbers in `{argument}`, got a tensor on the meta device")
        if x.layout is not torch.strided or x.is_nested:
            raise ValueError(f"expected dense tensors in `{argument}`, got one of layout {x.layout}; give x.to_dense()")
        if x.numel() == 0:
            raise ValueError(
                f"expected inputs with numbers in `{argument}`, got an empty one of shape {tuple(x.shape)}"
            )
        if x.is_floating_point() and not _finite(x):
            raise ValueError(f"expected finite numbers in `{argument}`, got NaN or infinity")
    try:
        call.copied()
    except Exception as error:
        raise ValueError(
            f"expected inputs that can be copied in `{argument}`, got {call}, with which that fails: {said(error)}"
        ) from error
    return call


def _finite(x: Tensor) -> bool:
    if bool(torch.isfinite(x).all()):
        return True
    return bool((x <= 0).all())  # -inf among numbers that are added to logits: a mask; NaN fails every comparison


# --- loaders -------------------------------------------------------------------------------------------------------


def _of_batch(batch: object, argument: str, model: nn.Module) -> Call:
    call = _call(batch, argument)
    if not isinstance(batch, tuple | list):
        return call
    given = len(batch)
    required, accepted = _positional(model)
    if given == required or given == 1:
        return call
    if required == accepted and given > required:  # labels come after the inputs
        return Call(call.args[:required], {})
    takes = "any number of" if math.isinf(accepted) else f"{required} to {accepted:.0f}"
    raise ValueError(
        f"expected batches of inputs alone in `{argument}`, got batches of {given} items where "
        f"{type(model).__name__}.forward takes {takes if required != accepted else required} arguments, so that labels "
        f"cannot be told from inputs; give batches that are mappings of arguments by name, or tensors"
    )


def _positional(model: nn.Module) -> tuple[int, float]:
    """How many arguments a forward pass needs, and how many it takes by position."""
    parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in named)
    return required, math.inf if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(named)
