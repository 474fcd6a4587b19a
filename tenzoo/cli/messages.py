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

from tenzoo.cli.causes import in_own_code, in_the_parser, of_a_library
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

COMMANDS = ("compress", "describe", "fit", "list", "predict", "test", "validate")

_OPTIMIZER_KEYS = {
    "learning rate": "lr",
    "weight decay": "weight_decay",
    "epsilon": "eps",
    "beta": "betas",
    "eta": "etas",
}
"""What torch's optimizers call an argument, where it is not its name."""
_OPTIMIZER_NUMBERS = {
    **dict.fromkeys(("lr", "eps"), "a positive number"),
    **dict.fromkeys(("weight_decay", "momentum", "alpha", "lr_decay", "momentum_decay"), "a number of at least 0"),
    "initial_accumulator_value": "a number of at least 0",
    "rho": "a number in [0, 1]",
    "betas": "numbers in [0, 1)",
    "etas": "two numbers, one in (0, 1) and one above 1,",
}
"""What is valid."""

_OF_LIGHTNING = {
    r"No supported gpu backend found": "expected an accelerator of this machine in `trainer.accelerator`, got gpu",
    r"invalid accelerator name: `accelerator='(.*?)'`. Available names are: (.*)\.": (
        "expected one of {1} in `trainer.accelerator`, got {0!r}"
    ),
    r"invalid strategy name: `strategy='(.*?)'`": (
        "expected auto, ddp or another strategy of Lightning in `trainer.strategy`, got {0!r}"
    ),
    r"value for the `profiler` parameter .* only be one of \[(.*)\]": (
        "expected one of {0} in `trainer.profiler`, got another name"
    ),
    r"^`Trainer\(barebones=True, (\w+)=": "expected no `trainer.barebones`, got true, which forbids the {0} of a run",
    r"`Trainer\(devices='?(.*?)'?\)` value is not a valid": "expected an int >= 1 in `trainer.devices`, got {0}",
    r"`devices` selected with `CPUAccelerator`": (
        "expected an int >= 1 in `trainer.devices` on the CPU, got another value"
    ),
    r"Nesterov momentum requires": (
        "expected a positive `momentum` and no `dampening` beside `nesterov` in `model.init_args.optimizer`, got others"
    ),
}
"""What Lightning and torch say at length, or without the argument's name."""


_REFUSALS = (
    *(ArgumentError, ValueError, TypeError, OSError, MisconfigurationException, ImportError, MemoryError),
    NotImplementedError,  # of a class that is abstract
)
_NO_MEMORY = re.compile("out of memory|can't allocate memory|overflow", re.IGNORECASE)
_MAX_NAMES, _NEAREST, _MAX_VALUE, _MAX_LINE = 12, 8, 80, 400
"""Names that are listed all, else the nearest of them; characters of a value that is shown, and of a library's text."""


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
    """Say what is wrong with the input, or where a user's own code failed; None for a defect of something else.

    Args:
        error: As caught.
        parser: Knows the valid options, for an unknown one.
    """
    if own := in_own_code(error):
        return Answer(f"tenzoo: {own}", 2 if own.refused else 1)
    out_of_memory = isinstance(error, RuntimeError | TypeError | MemoryError) and _NO_MEMORY.search(str(error))
    if not isinstance(error, _REFUSALS) and not out_of_memory:
        if not (isinstance(error, Exception) and in_the_parser(error)):
            return None
        got = f"others: {type(error).__name__}: {_cut(str(error), _MAX_LINE)}"
        return Answer(f"tenzoo: error: expected values of the kinds that the options take, got {got}", 2)
    if out_of_memory:
        asked = re.search(r"tried to allocate (\S+ \w+)", str(error), re.IGNORECASE)
        amount = f"of {asked[1]} that was refused" if asked else "beyond what can be addressed"
        line = f"expected a model and data that fit into memory, got an allocation {amount}; lower `rank` first"
    else:
        line = _told(error, parser)
    return Answer(f"tenzoo: error: {line}", 2)


def _told(error: BaseException, parser: ArgumentParser | None) -> str:
    origin = of_a_library(error)
    if isinstance(error, OSError) and error.filename is not None and not str(error).startswith("expected "):
        return f"expected a file or folder that can be used, got {str(error.filename)!r}: {error.strerror}"
    if not isinstance(error, ArgumentError) and origin is error:
        message = str(error)
        own = _from_a_library(message, "") or message
        return own if own.startswith("expected ") else _cut(own, _MAX_LINE)
    return explain(str(error), parser, origin)


def explain(message: str, parser: ArgumentParser | None = None, origin: BaseException | None = None) -> str:
    r"""Reduce an error of a parser to one line that names the argument, its value and what is valid.

    Parsers report nested alternatives over many lines: which of them was meant is told by the deepest cause.

    Args:
        message: The text of the exception.
        parser: Knows the valid options, for an unknown one.
        origin: What a library raised, if that was the cause.

    Example:
        >>> explain("Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: abc")
        'expected int in `trainer.max_steps`, got abc'
    """
    message = _of_one_class(message)
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([\w.]+)"', message)))
    where = f" in `{key}`" if key else ""
    if command := re.search(r"argument subcommand: invalid choice: '(.*?)'|\"subcommand\" to be one of", message):
        got = "none" if command[1] is None else repr(command[1])
        return f"expected a command, one of {', '.join(COMMANDS)}, got {got}"
    if own := re.search(r"^[\s-]*(?:Problems parsing config: )?(expected .+)$", message, re.MULTILINE):
        return own[1]
    if library := _from_a_library(message, where):
        return library
    for found in (_of_options, _of_classes):
        if line := found(message, parser, key):
            return line
    if origin is not None and not isinstance(origin, ImportError | AttributeError):
        return _cut(str(origin), _MAX_LINE)
    return _of_values(message, where) or _cut(message, _MAX_LINE)


def _of_options(message: str, parser: ArgumentParser | None, key: str) -> str | None:
    """Options that are unknown, or have no value."""
    where = f" in `{key}`" if key else ""
    if missing := re.search(r"arguments are required: (.+)", message):
        remedy = (
            "; give a config, as in --config configs/covid_tucker.yaml" if re.search(r"\.|model", missing[1]) else ""
        )
        return f"expected {missing[1]}{where}, got none{remedy}"
    if missing := re.search(r"argument (?:-\w/)?(--[\w.]+): expected one argument", message):
        return f"expected a value after {missing[1]}, got none"
    if missing := re.search(r"(?:File does not exist|Path is not a file): '(.+)'", message):
        return f"expected an existing file{where}, got {missing[1]!r}"
    if option := re.search(r"Option '([\w.]+)' is not accepted\. Got value: Namespace\(class_path='([\w.]+)'", message):
        return _of_parameters(option[2], option[1], where)
    refused_by_class = r"given class_path '([\w.]+)':\s+(?:Option '|unrecognized arguments: --)([\w.]+)"
    if option := re.search(refused_by_class, message):
        return _of_parameters(option[1], option[2], where)
    if option := re.search(r"(?:unrecognized arguments:|does not accept option) ?'?(-*[^\s'=]*)", message):
        name = option[1].removeprefix("--")
        prefix, beside = _options(parser, name)
        unknown = name.removeprefix(f"{prefix}.").partition(".")[0]
        return f"expected one of {_names(beside, unknown)}{f' under `{prefix}`' if prefix else ''}, got {name!r}"
    if name := re.search(r"Key must be a string, got: (.*)\.$|(Empty nested key)", message):
        return f"expected names as keys in YAML, got {name[1] or 'an empty one'}; put a number in quotes"
    return None


def _of_classes(message: str, _: ArgumentParser | None, key: str) -> str | None:
    """Classes that are unknown, or of another kind."""
    where = f" in `{key}`" if key else ""
    if kind := re.search(r"Import path (?:\S+ )?does not correspond to a subclass of (\w+)", message):
        return f"expected a subclass of {kind[1]}{where}, got {_given(message)}, which is none"
    if kind := re.search(r"Expected '(\S+)' to be a subclass of (?:Union\[|<class ')?(\w+)", message):
        return f"expected a subclass of {kind[2]}{where}, got {kind[1]}, which is none"
    if several := re.search(r"Multiple subclasses with name (\w+)\. Give the full class path .*: (.+)\.", message):
        return f"expected one of {several[2]}{where}, got {several[1]!r}, which may be each of them"
    if kind := re.search(r"Expected an instantiatable class, but (\S+) is abstract", message):
        return f"expected `class_path` and `init_args`{where}, got {_given(message)}; {kind[1]} alone is abstract"
    unknown = re.search(r"has no attribute '(\w+)'|import path string: (\S+)|No module named '([\w.]+)'", message)
    if unknown:
        value = next(group for group in unknown.groups() if group is not None)
        if classes := _classes(key):
            words = re.search(r"Expected a typing\.Literal\[(.+?)\]", message)
            either = f"{words[1]} or " if words else "a number, or " if "Expected a <class 'float'>" in message else ""
            return f"expected {either}a class{where}, one of {_names(classes, value.rpartition('.')[2])}, got {value!r}"
        if "Expected a <class" not in message.partition("Given value")[0].replace("Expected a <class 'NoneType'>", ""):
            return f"expected a mapping{where}, got {value!r}"
    return None


def _of_values(message: str, where: str) -> str | None:
    """Values of another type than the argument's."""
    if "Not a valid subclass of" in message:
        return f"expected `class_path` and `init_args`{where}, got {_given(message)}"
    if plain := re.search(r"Unexpected config: (.*)", message):
        return f"expected a mapping in YAML in `config`, got {_cut(plain[1], _MAX_VALUE)!r}"
    if plain := re.search(r"Unable to load config '(.*?)'", message):
        return f"expected a mapping, or a YAML file with one,{where}, got {_cut(plain[1], _MAX_VALUE)!r}"
    if literal := re.search(r"Expected a typing\.Literal\[(.+?)\]\. Got value: (.+)", message):
        return f"expected one of {literal[1]}{where}, got {_cut(literal[2], _MAX_VALUE)}"
    if types := re.findall(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.+?)\])", message):
        names = [literal or name.rpartition(".")[2].replace("Sequence", "list") for name, literal in types]
        kinds = dict.fromkeys(name for name in names if name != "NoneType")
        if kinds and re.search(r"Got value|Given value:", message):
            return f"expected {' or '.join(kinds)}{where}, got {_given(message)}"
    return None


def _given(message: str) -> str:
    """The value that was refused."""
    given = re.search(r"(?:Got value|Given value): ?(.*)", message)
    if given is None:
        return "none"
    value = re.sub(r"^NestedArg\(key='\w+', val='(.*)'\)$", r"\1", given[1])
    value = re.sub(r"^Namespace\(class_path='([\w.]+)'.*\)$", r"\1", value.partition(". Got value")[0])
    return _cut(value, _MAX_VALUE) or "''"


def _cut(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _from_a_library(message: str, where: str) -> str | None:
    """What Lightning and torch refuse themselves, when objects are made: they do not know the key."""
    for pattern, line in _OF_LIGHTNING.items():
        if found := re.search(pattern, message):
            return line.format(*found.groups())
    if seed := re.search(r"(\S+) is not in bounds, numpy accepts from (\d+) to (\d+)", message):
        return f"expected an int in [{seed[2]}, {seed[3]}] or a bool in `seed_everything`, got {seed[1]}"
    if package := re.search(r"Requirement '(([\w.-]+)[^']*)' not met", message):
        owner = re.search(r"given class_path '(?:\w+\.)*(\w+)'|^`(\w+)`", message)
        purpose = f" for {owner[1] or owner[2]}" if owner else ""
        return f"expected the package {package[2]}{purpose}{where}, got none; run pip install '{package[1]}'"
    number = re.fullmatch(r"Invalid ([\w ]+?)(?: values?| parameter at index \d)?: (.+)", message)
    number = number or re.fullmatch(r"([A-Za-z_ ]+)\d? should be >= 0 but is: (.+)", message)
    if number:
        key = _OPTIMIZER_KEYS.get(number[1].lower(), number[1])
        if key in _OPTIMIZER_NUMBERS:
            valid = _OPTIMIZER_NUMBERS[key]
            return f"expected {valid} in `model.init_args.optimizer.init_args.{key}`, got {number[2]}"
    return None


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
