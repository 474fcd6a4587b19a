"""Inputs as people have them, and how a model is called with them.

======================================  =====================================================
an input                                is called as
======================================  =====================================================
a tensor ``x``                          ``model(x)``
a tuple or a list ``(a, b)``            ``model(a, b)``; None and nested values are handed on
a mapping ``{"a": a}``, such as what    ``model(a=a)``
a tokenizer returns
a ``DataLoader``                        one call for each of its batches, see :func:`read_calls`
a list of :class:`Call`                 these
======================================  =====================================================

A model whose only argument is a list or a mapping takes it in a tuple: ``([image, image],)``.

Samples lie along the first size of the first tensor. The arguments are one sample where a list of tensors comes first,
or lists of plain values have another length: they are then not divided. Of an image without a batch the channels, and
of a batch that comes second the steps, are taken for samples: multiplications are those of one of them.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

Example: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any] | DataLoader[Any]
"""What a model is called with, or a ``DataLoader`` of that."""

SAMPLES = 128
"""How many are taken from a ``DataLoader``."""


@dataclass(frozen=True)
class Call:
    """The arguments of one forward pass.

    Args:
        args: By position.
        kwargs: By name.

    Example:
        >>> call = Call((torch.ones(4, 3), None), {"mask": torch.ones(4)})
        >>> call.size, call.part(1, 3).size
        (4, 2)
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, those in nested values too."""
        return tensors_in((self.args, dict(self.kwargs)))

    @property
    def size(self) -> int:
        """How many samples: the first size of the first tensor that has any; 0 if none has.

        It is 1 where samples cannot be told apart: if the first tensors come in a list, be it one of images or one of
        feature maps, or there are values of which it is not known which sample they belong to.
        """
        size = self.first_size
        return size if size < 2 or self._divides(size) else 1

    @property
    def first_size(self) -> int:
        """The first size of the first tensor that has any; 0 if none has."""
        return next((len(x) for x in self.tensors if x.ndim), 0)

    def _divides(self, size: int) -> bool:
        """Whether each value is one for each sample, or one for all of them."""
        values = [*self.args, *self.kwargs.values()]
        first = next(value for value in values if any(x.ndim for x in tensors_in(value)))
        while isinstance(first, Mapping):
            first = next(value for value in first.values() if any(x.ndim for x in tensors_in(value)))
        known = (Tensor, np.ndarray, str, bytes, int, float, complex, NoneType)
        return isinstance(first, Tensor) and all(
            # A list has a value for each sample; a tuple may, or it is a size.
            (len(leaf) == size) == isinstance(leaf, list) if _plain(leaf) else isinstance(leaf, known)
            for leaf in tree_leaves(values, is_leaf=_plain)
        )

    def map(self, function: Callable[[Tensor], Any]) -> "Call":
        """The same with something else in place of each tensor."""
        args, kwargs = tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, (self.args, dict(self.kwargs)))
        return Call(args, kwargs)

    def part(self, start: int, stop: int) -> "Call":
        """Some of the samples: of all tensors, arrays and lists of numbers or strings with one entry for each."""
        size = self.size
        if size == 1:
            return self

        def cut(x: Any) -> Any:
            own = x.ndim > 0 if isinstance(x, Tensor | np.ndarray) else _plain(x)
            return x[start:stop] if own and len(x) == size else x

        args, kwargs = tree_map(cut, (self.args, dict(self.kwargs)), is_leaf=_plain)
        return Call(args, kwargs)

    def on(self, model: Callable[..., Any]) -> Any:
        """What a model makes of it; the inputs stay as they are, though a model may change what it is given."""
        given = self.map(torch.clone)
        return model(*given.args, **given.kwargs)

    def run(self, model: nn.Module, argument: str) -> Any:
        """As :meth:`on`, with an error that says which input it was.

        Args:
            model: In the mode it is to run in.
            argument: Where the input came from.

        Raises:
            ValueError: If the model does not take the input.

        Example:
            >>> Call((torch.ones(4, 5),), {}).run(nn.Linear(3, 2), "calibration")
            Traceback (most recent call last):
            ...
            ValueError: expected an input of the model in `calibration`, got a tensor of shape (4, 5) and float32, \
with which it fails: RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x5 and 3x2)
        """
        try:
            return self.on(model)
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"expected an input of the model in `{argument}`, got {self}, with which it fails: {said(error)}"
            ) from error

    def __str__(self) -> str:
        named = [f"{_described(value)} as {name!r}" for name, value in self.kwargs.items()]
        return " and ".join([*map(_described, self.args), *named])


def _plain(value: Any) -> bool:
    """Whether something is a list or a tuple of numbers or strings."""
    known = isinstance(value, list | tuple) and bool(value)
    return known and all(isinstance(item, int | float | str) for item in value)


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses, such as the outputs of models."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors_in(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def read_call(example: object, argument: str, model: nn.Module) -> Call:
    """One call of a model; of a ``DataLoader`` it is the first batch.

    Args:
        example: What the user gave.
        argument: Its name, for the errors.
        model: Whose signature tells inputs from labels in a ``DataLoader``.

    Raises:
        TypeError: As :func:`read_calls`.
        ValueError: As :func:`read_calls`.
    """
    return read_calls(example, argument, model, samples=1, cut=False)[0]


def read_calls(
    example: object, argument: str, model: nn.Module, *, samples: int = SAMPLES, cut: bool = True
) -> list[Call]:
    """The calls of a model that an input stands for, checked.

    The batches of a ``DataLoader`` are taken in its order until there are so many samples. A batch is an input as any
    other, but for labels: a tuple or list with more items than ``forward`` takes stands for as many as it takes, if
    it takes none optionally; where labels could be meant for an optional argument, the loader is refused.

    Args:
        example: What the user gave.
        argument: Its name, for the errors.
        model: Whose signature tells inputs from labels in a ``DataLoader``.
        samples: How many to take from a ``DataLoader``; the size of a batch is that of its first tensor.
        cut: Whether the last batch is cut to that number.

    Raises:
        TypeError: If it is none of these inputs.
        ValueError: If there is no tensor, or one that is empty, not finite, sparse, or on the meta device; −inf may
            stand in a mask. If labels cannot be told from inputs.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.ones(300, 3), torch.zeros(300))
        >>> calls = read_calls(DataLoader(data, batch_size=100), "calibration", nn.Linear(3, 2))
        >>> [call.size for call in calls], len(calls[0].args)
        ([100, 28], 1)
    """
    if isinstance(example, list) and example and all(isinstance(call, Call) for call in example):
        calls: list[Call] = example
    elif isinstance(example, DataLoader):
        return read_batches(example, argument, model, samples=samples, cut=cut)
    else:
        calls = [_call(example, argument)]
    return _checked(calls, argument)


def read_batches(
    batches: Iterable[object], argument: str, model: nn.Module, *, samples: int = SAMPLES, cut: bool = True
) -> list[Call]:
    """The calls that batches stand for; arguments, errors and labels as with :func:`read_calls`."""
    calls = list(take((_of_batch(batch, argument, model) for batch in batches), samples, cut=cut))
    if not calls:
        raise ValueError(f"expected batches of inputs in `{argument}`, got none")
    return _checked(calls, argument)


def take(calls: Iterable[Call], samples: int, *, cut: bool = True) -> Iterator[Call]:
    """The first calls, until there are so many samples; the last one is cut to that number."""
    left = samples
    for call in calls:
        yield call.part(0, left) if cut and call.size > left else call
        left -= max(call.size, 1)
        if left <= 0:
            return


def hold_back(calls: Sequence[Call]) -> tuple[list[Call], list[Call]]:
    """Three quarters of the samples to decide with, and the last quarter to judge the decision by.

    A single sample is on both sides.

    Example:
        >>> first, last = hold_back([Call((torch.ones(6, 2),), {}), Call((torch.ones(2, 2),), {})])
        >>> [call.size for call in first], [call.size for call in last]
        ([6], [2])
    """
    samples = sum(call.size for call in calls)
    kept = samples - max(samples // 4, 1)
    if kept < 1:
        return list(calls), list(calls)
    first, last, before = [], [], 0
    for call in calls:
        border = min(max(kept - before, 0), call.size)
        if border:
            first.append(call.part(0, border))
        if border < call.size:
            last.append(call.part(border, call.size))
        before += call.size
    return first, last


def fingerprint(calls: Sequence[Call]) -> str:
    """A hash of the shapes, dtypes and numbers of all inputs, wherever they are stored.

    Example:
        >>> one, other = Call((torch.ones(2),), {}), Call((torch.ones(2, 1),), {})
        >>> fingerprint([one]) == fingerprint([one]), fingerprint([one]) == fingerprint([other])
        (True, False)
    """
    made = hashlib.sha256()
    for call in calls:
        for value in tree_leaves((call.args, sorted(call.kwargs.items()))):
            inner = tensors_in(value)
            for x in inner:
                made.update(f"{tuple(x.shape)} {x.dtype} ".encode())
                made.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            if not inner:
                made.update(f"{value!r} ".encode() if isinstance(value, str | int | float | None) else b"? ")
    return made.hexdigest()


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


def _checked(calls: list[Call], argument: str) -> list[Call]:
    for call in calls:
        _check(call, argument)
    return calls


def _check(call: Call, argument: str) -> None:
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


def _finite(x: Tensor) -> bool:
    if bool(torch.isfinite(x).all()):
        return True
    return bool((x <= 0).all())  # -inf among numbers that are added to logits: a mask; NaN fails every comparison


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else f"a {type(value).__name__}"


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
