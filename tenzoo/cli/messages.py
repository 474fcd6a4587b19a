"""One line for everything that can be wrong with a command line, a config file or a checkpoint."""

import importlib
import inspect
import re
from collections.abc import Iterable

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from torch import nn

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


def explain(message: str, parser: ArgumentParser | None = None) -> str:
    r"""Reduce an error to one line that names the argument, its value and what is valid.

    Parsers report nested alternatives over many lines: which of them was meant is told by the deepest cause.

    Args:
        message: The text of the exception.
        parser: Knows the valid options, for an unknown one.

    Example:
        >>> explain("Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: abc")
        'expected int in `trainer.max_steps`, got abc'
    """
    message = _of_one_class(message)
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    where = f" in `{key}`" if key else ""
    if own := re.search(r"^[\s-]*(expected .+)$", message, re.MULTILINE):
        return own[1]
    if library := _from_a_library(message, where):
        return library
    if missing := re.search(r"arguments are required: (.+)", message):
        remedy = (
            "; give a config, as in --config configs/covid_tucker.yaml" if re.search(r"\.|model", missing[1]) else ""
        )
        return f"expected {missing[1]}{where}, got none{remedy}"
    if missing := re.search(r"(?:File does not exist|Path is not a file): '(.+)'", message):
        return f"expected an existing file{where}, got {missing[1]!r}"
    if plain := re.search(r"Unexpected config: (.*)", message):
        return f"expected a mapping in YAML in `config`, got {plain[1]!r}"
    if option := re.search(r"Option '([\w.]+)' is not accepted\. Got value: Namespace\(class_path='([\w.]+)'", message):
        owner = option[2].rpartition(".")[2]
        return f"expected one of {_names(_parameters(option[2]))}{where} of {owner}, got {option[1]!r}"
    refused_by_class = r"given class_path '([\w.]+)':\s+(?:Option '|unrecognized arguments: --)([\w.]+)"
    if option := re.search(refused_by_class, message):
        owner = option[1].rpartition(".")[2]
        return f"expected one of {_names(_parameters(option[1]))}{where} of {owner}, got {option[2]!r}"
    if option := re.search(r"(?:unrecognized arguments:|does not accept option) '?(?:--)?([\w.]+)", message):
        prefix, beside = _options(parser, option[1])
        return f"expected one of {_names(beside)}{f' under `{prefix}`' if prefix else ''}, got {option[1]!r}"
    unknown = re.search(
        r"has no attribute '(\w+)'|import path string: (\S+)|No module named '([\w.]+)'|Import path ([\w.]+)", message
    )
    if unknown:
        value = next(group for group in unknown.groups() if group is not None)
        if classes := _classes(key):
            words = re.search(r"Expected a typing\.Literal\[(.+?)\]", message)
            either = f"{words[1]} or " if words else "a number, or " if "Expected a <class 'float'>" in message else ""
            return f"expected {either}a class{where}, one of {_names(classes)}, got {value!r}"
        if "Expected a <class" not in message.partition("Given value")[0].replace("Expected a <class 'NoneType'>", ""):
            return f"expected a mapping{where}, got {value!r}"
    if literal := re.search(r"Expected a typing\.Literal\[(.+?)\]\. Got value: (.+)", message):
        return f"expected one of {literal[1]}{where}, got {literal[2]}"
    if types := re.findall(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.+?)\])", message):
        given = re.search(r"(?:Got value|Given value): (.+)", message)
        names = [literal or name.rpartition(".")[2].replace("Sequence", "list") for name, literal in types]
        kinds = dict.fromkeys(name for name in names if name != "NoneType")
        if given and kinds:
            return f"expected {' or '.join(kinds)}{where}, got {given[1].partition('. Got value')[0]}"
    return re.sub(r"\s+", " ", message).strip()


def _from_a_library(message: str, where: str) -> str | None:
    """What Lightning and torch refuse themselves, when objects are made: they do not know the key."""
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


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "(nothing)"


def _parameters(class_path: str) -> set[str]:
    module, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    names: set[str] = set()
    for base in cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()
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
