"""Where an error was raised: in a user's own code, in a library, or in the parser of the command line."""

import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType

_PARSER = "jsonargparse"
_LIBRARIES = (
    *("tenzoo", _PARSER, "lightning", "lightning_utilities", "torch", "torchmetrics", "torchvision", "numpy"),
    *("matplotlib", "rich", "safetensors", "tensorboard", "tensorly", "yaml", "fsspec", "packaging"),
    *("docstring_parser", "typeshed_client", "typing_extensions"),
    *("accelerate", "datasets", "huggingface_hub", "peft", "sentencepiece", "tokenizers", "transformers"),
)
"""The packages that tenzoo uses. Code outside of them and of Python's own is a user's."""

_PYTHON = Path(os.__file__).parent
_INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class Raised:
    """An exception and the place where it was raised.

    Args:
        error: The exception.
        place: File, line and function.
    """

    error: BaseException
    place: str

    @property
    def message(self) -> str:
        """The text of the exception in one line."""
        return " ".join(str(self.error.msg if isinstance(self.error, SyntaxError) else self.error).split())

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.error).__name__


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
        told = type(current).__module__.startswith("tenzoo.") and current.__suppress_context__  # it says all there is
        context = None if told else current.__context__
        pending += [cause for cause in (current.__cause__, context) if cause is not None]
        pending += _alternatives(current.__traceback__)


def in_own_code(error: BaseException) -> Raised | None:
    """The exception of a chain that a user's own code raised, or made another raise; None if it took no part.

    The place is the innermost frame of a user's code.

    Example:
        >>> in_own_code(ValueError("never raised")) is None
        True
    """
    for cause in chain(error):
        if isinstance(cause, SyntaxError) and cause.filename and not _is_library(cause.filename, ""):
            return Raised(cause, f"{cause.filename}:{cause.lineno}")
        own = [(frame, line) for frame, line in _frames(cause) if not _is_library(*_origin(frame))]
        if own:
            frame, line = own[-1]
            return Raised(cause, _place(frame.f_code.co_filename, frame, line))
    return None


def raised_by_own_code(error: BaseException) -> bool:
    """Whether a user's own code raised an exception, and not what it called."""
    frames = _frames(error)
    return bool(frames) and not _is_library(*_origin(frames[-1][0]))


def in_a_library(error: BaseException) -> Raised | None:
    """The exception of a chain that a library other than the parser raised; None if there is none.

    What the parser tried first and did not report does not count.
    """
    reported = " ".join(str(error).split())
    for cause in chain(error):
        frames = [(frame, line) for frame, line in _frames(cause) if _package(frame) in _LIBRARIES]
        if not frames or missing_name(cause) or " ".join(str(cause).split()) not in reported:
            continue
        frame, line = frames[-1]
        if _package(frame) != _PARSER:
            parts = Path(frame.f_code.co_filename).parts
            start = len(parts) - 1 - parts[::-1].index(_package(frame)) if _package(frame) in parts else -1
            return Raised(cause, _place("/".join(parts[start:]), frame, line))
    return None


def by_tenzoo(error: BaseException) -> bool:
    """Whether the exception is one that tenzoo raised, as it raises all of its own."""
    frames = _frames(error)
    return bool(frames) and _package(frames[-1][0]) == "tenzoo" and str(error).startswith("expected ")


def under_the_parser(error: BaseException) -> bool:
    """Whether the parser raised the exception, or called what raised it."""
    return any(_package(frame) == _PARSER for frame, _ in _frames(error))


def missing_name(error: BaseException) -> str | None:
    """The name that the parser did not find when it imported it; None where the exception is another one.

    Code that ran while it was imported is not at fault: its exceptions are its own.
    """
    frames = [frame for frame, _ in _frames(error)]
    for number, frame in enumerate(frames):
        if _package(frame) == _PARSER and frame.f_code.co_name == "import_object":
            below = frames[number + 1 :]  # a module may have a function __getattr__ that answers for it
            if all(_package(each) in ("importlib", _PARSER) or each.f_code.co_name == "__getattr__" for each in below):
                return str(frame.f_locals["name"])
    return None


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    return list(traceback.walk_tb(error.__traceback__))


def _origin(frame: FrameType) -> tuple[str, str]:
    return frame.f_code.co_filename, _package(frame)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def _place(file: str, frame: FrameType, line: int) -> str:
    name = frame.f_code.co_qualname
    return f"{file}:{line}{'' if name == '<module>' else f', in {name}'}"


def _alternatives(trace: TracebackType | None) -> list[BaseException]:
    return [
        failed
        for frame, _ in traceback.walk_tb(trace)
        if frame.f_code.co_name == "raise_union_unexpected_value"
        for failed in frame.f_locals.get("exceptions", [])
    ]


def _is_library(file: str, package: str) -> bool:
    path = Path(file)
    if path.suffix != ".py":  # a name in <> is of the interpreter, of code made at run time, or of a text that is run
        return package in _LIBRARIES or package in sys.stdlib_module_names
    if path.is_relative_to(_PYTHON) and not _INSTALLED & set(path.parts):
        return True
    return any(path.is_relative_to(root) for root in _roots())


@cache
def _roots() -> list[Path]:
    found = [spec for name in _LIBRARIES if (spec := importlib.util.find_spec(name)) is not None]
    return [Path(root) for spec in found for root in spec.submodule_search_locations or [str(spec.origin)]]
