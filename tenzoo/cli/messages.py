"""One line for everything that can be wrong with a command line, a config file or a checkpoint."""

import importlib
import inspect
import re
from argparse import ArgumentError
from collections.abc import Collection
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from torch import nn

from tenzoo.causes import by_tenzoo, chain, in_a_library, in_own_code, missing_name, under_the_parser
from tenzoo.data import LabelNoise
from tenzoo.tasks import Task

_KINDS: dict[str, type] = {
    "model": Task,
    "data": LightningDataModule,
    "callbacks": Callback,
    "logger": Logger,
    "network": nn.Module,
    "noise": LabelNoise,
    "optimizer": torch.optim.Optimizer,
    "lr_scheduler": torch.optim.lr_scheduler.LRScheduler,
}
"""The class of the objects that an option takes, by the last part of its name."""

_REFUSALS = (
    *(ArgumentError, ValueError, TypeError, OSError, MisconfigurationException, ImportError, MemoryError),
    NotImplementedError,  # of a class that is abstract
)
_NO_MEMORY = re.compile("out of memory|can't allocate memory|overflow", re.IGNORECASE)
_UNKNOWN_OPTION = (
    r"Option '(?P<option>[\w.]+)' is not accepted\. Got value: Namespace\(class_path='(?P<owner>[\w.]+)'",
    r"given class_path '(?P<owner>[\w.]+)':\s+(?:Option '|unrecognized arguments: --)(?P<option>[\w.]+)",
    r"(?:unrecognized arguments:|does not accept option) ?'?(?:--)?(?P<option>[^\s'=]*)",
)
"""How jsonargparse says that it does not know an option of a class, or of a command."""
_HEADINGS = ("Does not validate against any", "Subtypes:", "Errors:", "Given value", "Expected a NoneType")
"""Lines in which jsonargparse repeats what the others say, or says that null is valid."""
_MAX_NAMES, _NEAREST, _MAX_VALUE, _MAX_LINE = 12, 8, 80, 320
"""Names that are listed all, else the nearest of them; characters of a value that is shown, and of a library's text."""


class RefusedError(ValueError):
    """Input that is refused, with a text that says everything in one line."""


@dataclass(frozen=True)
class Answer:
    """What a command says of an error, in one line.

    Args:
        line: For stderr.
        code: Exit code: 2 for input that was refused, 1 for an error in a user's own code.
    """

    line: str
    code: int


def answer(error: BaseException, parser: ArgumentParser | None = None) -> Answer | None:
    """Say what is wrong with the input, or where code failed that it names; None for a defect of something else.

    Args:
        error: As caught.
        parser: Knows the valid options, for an unknown one.
    """
    if own := in_own_code(error):
        if by_tenzoo(own.error):
            return Answer(f"tenzoo: error: {own.message} ({own.kind} in {own.place})", 2)
        return Answer(f"tenzoo: error in {own.place}: {own.kind}{own.message and f': {own.message}'}", 1)
    if not isinstance(error, Exception):
        return None
    out_of_memory = isinstance(error, RuntimeError | TypeError | MemoryError) and _NO_MEMORY.search(str(error))
    if out_of_memory:
        asked = re.search(r"tried to allocate (\S+ \w+)", str(error), re.IGNORECASE)
        amount = f"of {asked[1]} that was refused" if asked else "beyond what can be addressed"
        line = f"expected a model and data that fit into memory, got an allocation {amount}; lower `rank` first"
    elif isinstance(error, _REFUSALS) or under_the_parser(error):
        line = explain(error, parser)
    else:
        return None
    return Answer(f"tenzoo: error: {line}", 2)


def explain(error: Exception, parser: ArgumentParser | None = None) -> str:
    r"""Reduce an error to one line: tenzoo's own text, an unknown option or class, or the original message.

    Args:
        error: As caught.
        parser: Knows the valid options, for an unknown one.

    Example:
        >>> explain(ValueError("Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: abc"))
        'expected another value in `trainer.max_steps`, got abc: Expected a int'
    """
    if isinstance(error, RefusedError):
        return str(error)
    message = " ".join(str(error).split())
    for cause in chain(error):
        text = " ".join(str(cause).split())
        if by_tenzoo(cause) and text in message:
            return text
    if isinstance(error, OSError) and error.filename is not None:
        return f"expected a file or folder that can be used, got {str(error.filename)!r}: {error.strerror}"
    if line := _of_option(error, parser) or _of_class(error):
        return line
    if library := in_a_library(error):
        return f"{library.kind}: {_cut(library.message, _MAX_LINE)} ({library.place})"
    return _of_value(error)


def _key(message: str) -> str:
    """The option that a message of the parser is about, such as ``model.rank``."""
    return ".".join(dict.fromkeys(re.findall(r'Parser key "([\w.]+)"', message)))


def _where(message: str) -> str:
    key = _key(message)
    return f" in `{key}`" if key else ""


def _of_option(error: Exception, parser: ArgumentParser | None) -> str | None:
    """An option that is unknown."""
    message = _of_one_class(str(error))
    unknown = next((found for pattern in _UNKNOWN_OPTION if (found := re.search(pattern, message))), None)
    if unknown is None or not under_the_parser(error):
        return None
    option, owner = unknown["option"], unknown.groupdict().get("owner")
    if owner is not None:
        return _of_parameters(owner, option, _where(message))
    prefix, valid = _options(parser, option)
    name = option.removeprefix(f"{prefix}.").partition(".")[0]
    return f"expected one of {_names(valid, name)}{f' under `{prefix}`' if prefix else ''}, got {option!r}"


def _of_class(error: Exception) -> str | None:
    """A class that is unknown."""
    classes = _classes(_key(str(error)))
    name = next((name for cause in chain(error) if (name := missing_name(cause)) is not None), None)
    if name is None or not classes:
        return None
    words = re.search(r"Expected a typing\.Literal\[(.+?)\]", str(error))
    number = "a number, or " if "Expected a <class 'float'>" in str(error) else ""
    either = f"{words[1]} or " if words else number
    near = _names(classes, name.rpartition(".")[2])
    return f"expected {either}a class{_where(str(error))}, one of {near}, got {_cut(name, _MAX_VALUE)!r}"


def _of_value(error: Exception) -> str:
    """The original message, of the innermost option that it is about, with the option and its value in front."""
    message = str(error)
    text = str(_innermost(error, _key(message)))
    value = re.search(r"(?:Got value|Given value): ?(.*)", text)
    got = "" if value is None else f", got {_value(value[1])}"
    plain = re.sub(r'Parser key "[\w.]+":|\. Got value: .*', "", re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text))
    lines = dict.fromkeys(line.strip(" -") for line in plain.splitlines())
    said = "; ".join(line for line in lines if line and not line.startswith(_HEADINGS)).replace(":;", ":")
    said = _cut(said, _MAX_LINE) or "it is not valid"
    return f"expected another value{_where(message)}{got}: {said}" if _key(message) or got else said


def _innermost(error: Exception, key: str) -> BaseException:
    """What was said of an option alone; of several alternatives, the class that was named."""
    last = key.rpartition(".")[2]
    inner = [cause for cause in chain(error) if _key(str(cause)).rpartition(".")[2] == last != ""]
    shortest = min(inner, key=lambda cause: len(str(cause)), default=error)
    of_class = (cause for cause in chain(shortest) if str(cause).startswith("Problem with given class_path"))
    return next(of_class, shortest)


def _value(text: str) -> str:
    """A value as it was given: a setting of an object without the object, an object as its class."""
    text = re.sub(r"^NestedArg\(key='[\w.]+', val='(.*)'\)$", r"\1", text)
    return _cut(re.sub(r"^Namespace\(class_path='([\w.]+)'.*\)$", r"\1", text), _MAX_VALUE) or repr("")


def _cut(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _of_one_class(message: str) -> str:
    """Without the complaint of an abstract base that was tried after the class that was meant."""
    of_base = r"- Problem with given class_path 'lightning\.[\w.]*Callback':\s+Option '\w+' is not accepted"
    rest = re.sub(of_base, "", message)
    return rest if "Problem with given class_path" in rest else message


def _names(names: Collection[str], word: str) -> str:
    """All of a few names; of many, those that look most like a word."""
    if len(names) <= _MAX_NAMES:
        return ", ".join(sorted(names)) or "(nothing)"

    def likeness(name: str) -> float:
        return SequenceMatcher(None, word.lower(), name.lower()).ratio()

    nearest = sorted(sorted(names), key=likeness, reverse=True)[:_NEAREST]
    return f"{', '.join(sorted(nearest))} and {len(names) - _NEAREST} more"


def _of_parameters(class_path: str, option: str, where: str) -> str:
    name = class_path.rpartition(".")[2]
    try:
        names = _names(_parameters(class_path), option.partition(".")[0])
    except (TypeError, ValueError):  # of a function that is written in C
        return f"expected what {name} takes{where}, got {option!r}"
    return f"expected one of {names}{where} of {name}, got {option!r}"


def _parameters(class_path: str) -> set[str]:
    module, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    names: set[str] = set()
    own = [vars(base) for base in cls.__mro__] if isinstance(cls, type) else [{"__init__": cls}]
    for made in [attributes["__init__"] for attributes in own if "__init__" in attributes]:
        parameters = inspect.signature(made).parameters.values()
        names.update(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}


def _options(parser: ArgumentParser | None, option: str) -> tuple[str, set[str]]:
    """The longest prefix that an unknown option shares with any, empty at the top, and the options under it."""
    known = [] if parser is None else [action.dest for action in parser._actions if action.dest != "help"]
    parts = option.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        prefix = "".join(f"{part}." for part in parts[:depth])
        beside = {dest.removeprefix(prefix).partition(".")[0] for dest in known if dest.startswith(prefix)}
        if beside:
            return prefix.removesuffix("."), beside
    return "", set()


def _classes(key: str) -> set[str]:
    names: set[str] = set()
    pending: list[type] = [kind] if (kind := _KINDS.get(key.rpartition(".")[2])) else []
    while pending:
        subclasses: list[type] = pending.pop().__subclasses__()
        for cls in subclasses:
            pending.append(cls)
            public = cls.__module__.startswith(("tenzoo.", "torch.optim", "lightning.pytorch."))
            if public and not cls.__name__.startswith("_") and not inspect.isabstract(cls):
                names.add(cls.__name__)
    return names
