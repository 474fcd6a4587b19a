"""Where an error comes from: a user's own code keeps type, message, file and line of what it raised."""

import importlib.util
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType

_LIBRARIES = (
    *("tenzoo", "jsonargparse", "lightning", "lightning_utilities", "torch", "torchmetrics", "torchvision", "numpy"),
    *("matplotlib", "rich", "safetensors", "tensorboard", "tensorly", "yaml", "fsspec", "packaging"),
    *("docstring_parser", "typeshed_client", "typing_extensions"),
)
"""What tenzoo is made of. Code outside of it and of Python's own is a user's."""

_PYTHON = Path(os.__file__).parent
_INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class OwnError:
    """What was raised in, or below, a user's own code.

    Args:
        error: The exception.
        place: File, line and function of the innermost frame of a user's code.
        refused: Whether tenzoo raised it, of what that code handed on.
    """

    error: BaseException
    place: str
    refused: bool

    def __str__(self) -> str:
        message = " ".join(str(self.error.msg if isinstance(self.error, SyntaxError) else self.error).split())
        name = type(self.error).__name__
        if self.refused:
            return f"error: {message} ({name} in {self.place})"
        return f"error in {self.place}: {name}{f': {message}' if message else ''}"


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it, the latest first.

    Of the alternatives of a type that all failed, jsonargparse chains one only: the others are found in its frame.
    """
    pending, seen = [error], set[int]()
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        pending += [cause for cause in (current.__cause__, current.__context__) if cause is not None]
        pending += _alternatives(current.__traceback__)


def in_own_code(error: BaseException) -> OwnError | None:
    """What a user's own code raised, or made another raise; None if it took no part.

    Example:
        >>> in_own_code(ValueError("never raised")) is None
        True
    """
    for cause in chain(error):
        if place := _place(cause):
            frames = _frames(cause)
            refused = bool(frames) and _package(frames[-1][0]) == "tenzoo" and str(cause).startswith("expected ")
            return OwnError(cause, place, refused)
    return None


def of_a_library(error: BaseException) -> BaseException | None:
    """What was raised when an object was made, below the parser's report that none could be made."""
    for cause in chain(error):
        frames = _frames(cause)
        if frames and frames[-1][0].f_code.co_name != "__getattr__":  # which answers for a module
            package = _package(frames[-1][0])
            if package in _LIBRARIES and package != "jsonargparse":
                return cause
    return None


def in_the_parser(error: BaseException) -> bool:
    """Whether the parser itself fell over what it was given."""
    frames = _frames(error)
    return bool(frames) and _package(frames[-1][0]) == "jsonargparse"


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    return list(traceback.walk_tb(error.__traceback__))


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def _alternatives(trace: TracebackType | None) -> list[BaseException]:
    return [
        failed
        for frame, _ in traceback.walk_tb(trace)
        if frame.f_code.co_name == "raise_union_unexpected_value"
        for failed in frame.f_locals.get("exceptions", [])
    ]


def _place(error: BaseException) -> str | None:
    if isinstance(error, SyntaxError) and error.filename and not _is_library(error.filename):
        return f"{error.filename}:{error.lineno}"
    own = [(frame, line) for frame, line in _frames(error) if not _is_library(frame.f_code.co_filename)]
    if not own:
        return None
    frame, line = own[-1]
    name = frame.f_code.co_qualname
    return f"{frame.f_code.co_filename}:{line}{'' if name == '<module>' else f', in {name}'}"


def _is_library(file: str) -> bool:
    path = Path(file)
    if path.suffix != ".py" or (path.is_relative_to(_PYTHON) and not _INSTALLED & set(path.parts)):
        return True  # a name in <> is of the interpreter or made at run time, another ending of an extension in C
    return any(path.is_relative_to(root) for root in _roots())


@cache
def _roots() -> list[Path]:
    found = [spec for name in _LIBRARIES if (spec := importlib.util.find_spec(name)) is not None]
    return [Path(root) for spec in found for root in spec.submodule_search_locations or [str(spec.origin)]]
