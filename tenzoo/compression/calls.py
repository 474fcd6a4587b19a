"""One forward pass of a model: its arguments, how they are divided, copied and told from others."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Call:
    """The arguments of one forward pass.

    Args:
        args: By position.
        kwargs: By name.

    Example:
        >>> Call((torch.ones(4, 3), None), {"mask": torch.ones(4)}).size
        4
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

        It is 1 where the first tensors come in a list, be it one of images or one of feature maps.
        """
        return self.first_size if isinstance(self._first(), Tensor) or self.first_size == 0 else 1

    @property
    def first_size(self) -> int:
        """The first size of the first tensor that has any; 0 if none has."""
        return next((len(x) for x in self.tensors if x.ndim), 0)

    def _first(self) -> Any:
        """The first argument, or item of a mapping, in which there is a tensor that has a size."""
        value: Any = {**dict(enumerate(self.args)), **self.kwargs}
        while isinstance(value, Mapping):
            value = next((each for each in value.values() if any(x.ndim for x in tensors_in(each))), None)
        return value

    def map(self, function: Callable[[Tensor], Any]) -> "Call":
        """The same with something else in place of each tensor."""
        args, kwargs = tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, (self.args, dict(self.kwargs)))
        return Call(args, kwargs)

    def parts(self, *chosen: Sequence[int]) -> Iterator[list["Call"]]:
        """Ways in which samples could lie in the arguments: what belongs to some of them, by their numbers.

        A tensor or an array with as many rows as there are samples has one for each. A list or a tuple of that length
        may have one item for each too, or what it holds is divided.

        Example:
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
        """What a model makes of it; the inputs stay as they are, though a model may change what it is given."""
        given = self.copied()
        return model(*given.args, **given.kwargs)

    def copied(self) -> "Call":
        """The same in memory of its own, objects of any class included."""
        memo: dict[int, Any] = {id(x): x.clone() for x in self.tensors}
        args, kwargs = copy.deepcopy((self.args, dict(self.kwargs)), memo)
        return Call(args, kwargs)

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


def _cut(value: Any, samples: Sequence[int], size: int, kinds: tuple[type, ...]) -> Any:
    """Some of the samples of a value, where lists of these kinds and of the right length have an item for each."""
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
"""Divides a call before one of its samples; None where they cannot be told apart."""


def take(calls: Iterable[Call], samples: int, divide: Divide) -> Iterator[Call]:
    """The first calls, until there are so many samples; the last one is cut to that number if it can be."""
    left = samples
    for call in calls:
        parts = divide(call, left) if call.size > left else None
        yield call if parts is None else parts[0]
        left -= max(call.size, 1)
        if left <= 0:
            return


def hold_back(calls: Sequence[Call], divide: Divide) -> tuple[list[Call], list[Call]]:
    """Three quarters of the samples to decide with, and the last quarter to judge the decision by.

    A call that cannot be divided is on one side as a whole. Where nothing is left for the other, all are on both.

    Example:
        >>> calls = [Call((torch.ones(6, 2),), {}), Call((torch.ones(2, 2),), {})]
        >>> first, last = hold_back(calls, lambda call, border: None)
        >>> [call.size for call in first], [call.size for call in last]
        ([6], [2])
    """
    samples = sum(call.size for call in calls)
    kept = samples - max(samples // 4, 1)
    first: list[Call] = []
    last: list[Call] = []
    before = 0
    for call in calls:
        border = min(max(kept - before, 0), call.size)
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


def fingerprint(calls: Sequence[Call]) -> str:
    """A hash of the shapes, dtypes and numbers of all inputs, wherever they are stored, and of all else in them.

    Raises:
        ValueError: If there is a value of which nothing is known.

    Example:
        >>> one, other = Call((torch.ones(2),), {}), Call((torch.ones(2, 1),), {})
        >>> fingerprint([one]) == fingerprint([one]), fingerprint([one]) == fingerprint([other])
        (True, False)
    """
    made = hashlib.sha256()
    for call in calls:
        try:
            for value in (*call.args, *(part for named in sorted(call.kwargs.items()) for part in named)):
                for content in _content(value, ()):
                    made.update(content)
        except Exception as error:
            raise ValueError(
                f"expected inputs that can be told apart in `calibration`, got {call}: {said(error)}"
            ) from error
    return made.hexdigest()


def _content(value: Any, around: tuple[int, ...]) -> Iterator[bytes]:
    """What tells a value from others, whatever its class: what a copy of it would be made of."""
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
        yield f"{tuple(value.shape)} {value.dtype} ".encode()
        yield (
            value.detach()
            .cpu()
            .resolve_conj()
            .resolve_neg()
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.shape} {value.dtype} ".encode()
        yield value.tobytes()
    elif isinstance(value, str | int | float | complex | bytes | NoneType | torch.layout):
        yield f"{value!r} ".encode()
    elif isinstance(value, type | FunctionType | BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__} ".encode()
    elif id(value) in around:
        yield b"itself "
    elif isinstance(value, set | frozenset):
        yield b"set "
        yield from sorted(b"".join(_content(each, (*around, id(value)))) for each in value)
    else:
        parts = (
            value if type(value) in (list, tuple) else list(value.items()) if type(value) is dict else _made_of(value)
        )
        yield f"{type(value).__name__} {len(parts)} ".encode()
        for part in parts:
            yield from _content(part, (*around, id(value)))


def _made_of(value: Any) -> Sequence[Any]:
    parts = value.tolist() if isinstance(value, np.ndarray) else value.__reduce_ex__(4)
    if isinstance(parts, str):
        return [parts]
    return [list(part) if isinstance(part, Iterator) else part for part in parts]
