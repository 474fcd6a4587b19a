"""Which arguments of a task can be saved."""

from collections.abc import Mapping
from types import FrameType

from torch import nn


def modules_given(frame: FrameType | None) -> list[str]:
    """Names of the arguments of an ``__init__``, and of those of subclasses around it, that are modules."""
    names: list[str] = []
    while frame is not None and "__class__" in frame.f_locals:
        names += [name for name, value in frame.f_locals.items() if isinstance(value, nn.Module) and name != "self"]
        frame = frame.f_back
    return names


def is_plain(value: object) -> bool:
    """Whether a value is of builtins alone, which a checkpoint that runs no code can hold."""
    if isinstance(value, Mapping):
        return type(value) is dict and all(is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)
