"""One forward pass of a model: its arguments, and how they are divided and copied."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Call:
    """The arguments of one forward pass.

    Args:
        args: By position.
        kwargs: By name.

    Example:
        >>> import torch
        >>> Call((torch.ones(4, 3), None), {"mask": torch.ones(4)}).size
        4
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, those in nested values too."""
        return tensors_in((self.args, dict(self.kwargs)))

    @property
    def size(self) -> int:
        """Number of samples: the first size of the first tensor that has any; 0 if none has.

        It is 1 if the first tensors come in a list, such as a list of images or of feature maps.
        """
        return self.first_size if isinstance(self._first(), Tensor) or self.first_size == 0 else 1

    @property
    def first_size(self) -> int:
        """The first size of the first tensor that has any; 0 if none has."""
        return next((len(x) for x in self.tensors if x.ndim), 0)

    def _first(self) -> Any:
        """The first argument, or item of a mapping, with a tensor that has a size."""
        value: Any = {**dict(enumerate(self.args)), **self.kwargs}
        while isinstance(value, Mapping):
            value = next((each for each in value.values() if any(x.ndim for x in tensors_in(each))), None)
        return value

    def map(self, function: Callable[[Tensor], Any]) -> "Call":
        """The same call with a function applied to each tensor."""
        args, kwargs = tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, (self.args, dict(self.kwargs)))
        return Call(args, kwargs)

    def parts(self, *chosen: Sequence[int]) -> Iterator[list["Call"]]:
        """Ways in which samples could lie in the arguments, each as the parts for the chosen numbers of samples.

        A tensor or an array with as many rows as samples has one row for each. A list or a tuple of that length may
        have one item for each sample too, or its items are divided.

        Example:
            >>> import torch
            >>> call = Call((torch.ones(2, 3), [[1, 2], [3, 4]]), {})
            >>> [part.args[1] for (part,) in call.parts([0])]
            [[[1, 2]], [[1, 2]], [[1, 2], [3, 4]]]
        """
        for kinds in ((list, tuple), (list,), ()):
            yield [
                Call(
                    tuple(_cut(value, samples, self.size, kinds) for value in self.args),
                    {name: _cut(value, samples, self.size, kinds) for name, value in self.kwargs.items()},
                )
                for samples in chosen
            ]

    def on(self, model: Callable[..., Any]) -> Any:
        """The outputs of a model; it gets copies of the inputs, which it may change."""
        given = self.copied()
        return model(*given.args, **given.kwargs)

    def copied(self) -> "Call":
        """A copy, objects of any class included."""
        memo: dict[int, Any] = {id(x): x.clone() for x in self.tensors}
        args, kwargs = copy.deepcopy((self.args, dict(self.kwargs)), memo)
        return Call(args, kwargs)

    def run(self, model: nn.Module, argument: str) -> Any:
        """As :meth:`on`, with an error that names the input.

        Args:
            model: A model, in the mode to run in.
            argument: The argument that the input came from.

        Raises:
            ValueError: If the model does not take the input.

        Example:
            >>> import torch
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


def _cut(value: Any, samples: Sequence[int], size: int, kinds: tuple[type, ...]) -> Any:
    """Some of the samples of a value; lists of these kinds and of the right length have one item for each sample."""
    if isinstance(value, Tensor | np.ndarray):
        return value[list(samples)] if value.ndim and len(value) == size else value
    if type(value) in kinds and len(value) == size:
        return type(value)(value[sample] for sample in samples)
    if type(value) in (list, tuple):
        return type(value)(_cut(each, samples, size, kinds) for each in value)
    if type(value) is dict:
        return {key: _cut(each, samples, size, kinds) for key, each in value.items()}
    return value


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else f"a {type(value).__name__}"


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


Divide: TypeAlias = Callable[[Call, int], tuple[Call, Call] | None]
"""Divides a call before one of its samples; None if the samples cannot be told apart."""


def take(calls: Iterable[Call], samples: int, divide: Divide) -> Iterator[Call]:
    """The first calls with this number of samples in all; the last one is cut to fit if possible."""
    left = samples
    for call in calls:
        parts = divide(call, left) if call.size > left else None
        yield call if parts is None else parts[0]
        left -= max(call.size, 1)
        if left <= 0:
            return


def hold_back(calls: Sequence[Call], divide: Divide) -> tuple[list[Call], list[Call]]:
    """Three quarters of the samples for a decision, and the last quarter to judge it.

    A call that cannot be divided stays whole, on one side. If one side would be empty, both have all calls.

    Example:
        >>> import torch
        >>> calls = [Call((torch.ones(6, 2),), {}), Call((torch.ones(2, 2),), {})]
        >>> first, last = hold_back(calls, lambda call, border: None)
        >>> [call.size for call in first], [call.size for call in last]
        ([6], [2])
    """
    samples = sum(call.size for call in calls)
    num_first = samples - max(samples // 4, 1)
    first: list[Call] = []
    last: list[Call] = []
    before = 0
    for call in calls:
        border = min(max(num_first - before, 0), call.size)
        before += call.size
        parts = divide(call, border) if 0 < border < call.size else None
        if parts is not None:
            first.append(parts[0])
            last.append(parts[1])
        elif border == call.size or not first:
            first.append(call)
        else:
            last.append(call)
    return (first, last) if first and last else (every := list(calls), every)
