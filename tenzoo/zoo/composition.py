"""Settings that were meant for something else: what a config says of another optimizer, or of another data set.

Configs compose key by key. Where a later one names another optimizer, the learning rate of the one before would stay;
where the command line names a file of one's own, the split or the vocabulary of a benchmark would.
"""

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info

from tenzoo.data import ImageDataModule, TextCorpusDataModule
from tenzoo.data.completion import DATASETS
from tenzoo.zoo.yaml_files import load

OPTIMIZER = "model.optimizer"
_ADAPTIVE = frozenset({"Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SparseAdam", "RMSprop"})
"""Their steps are of the size of the learning rate, whatever the size of the gradient: it means the same for each."""
_PROPORTIONAL = frozenset({"SGD", "ASGD"})
"""Their steps are as large as the gradient. Those of torch's others are not, and have rates of their own."""
_PENALIZES = frozenset({"SGD", "ASGD", "Adam", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop"})
"""Their weight decay is a penalty in the loss, and so means the same for each; that of AdamW is not."""
_HOW = frozenset({"foreach", "fused", "capturable", "differentiable", "maximize"})
"""How a step is carried out, whichever it is."""

_CORPUS = "tenzoo.data.TextCorpusDataModule"

_OF_DATA = frozenset({"observed_fraction", "validation_fraction", "shape", "num_entries", "predict_index"})
"""What is chosen for one data set and means nothing for another."""


@dataclass
class Layer:
    """What one config file, or one argument, gives.

    Args:
        given: Values by key, without ``init_args`` in it: ``model.optimizer.lr``.
        by_hand: Whether it is an argument.
    """

    given: Mapping[str, Any]
    by_hand: bool


def layers(args: Sequence[str], subcommand: str | None) -> Iterator[Layer]:
    """The files and arguments of a command line that was parsed, in the order in which they take effect.

    Example:
        >>> [layer.given for layer in layers(["--model.init_args.optimizer", "Adam", "--model.optimizer.lr=1"], None)]
        [{'model.optimizer': 'Adam'}, {'model.optimizer.lr': 1}]
    """
    words = list(args)
    for position, word in enumerate(words):
        if not word.startswith("-"):
            continue
        key, equals, value = word.lstrip("-").partition("=")
        if not equals:
            value = words[position + 1] if position + 1 < len(words) else ""
        if key in ("config", "c"):
            given = {name.removeprefix(f"{subcommand}."): each for name, each in _flat("", _load(value)).items()}
            yield Layer(given, by_hand=False)
        else:
            yield Layer(_flat(_key(key), _load(value)), by_hand=True)


def settle(config: Namespace, args: Sequence[str], subcommand: str | None) -> None:
    """Replace what was meant for something else by what is right for what is there now, and say so in a line each.

    Args:
        config: Of the subcommand; changed in place.
        args: Of the command line.
        subcommand: Its name, or None.

    Raises:
        ValueError: If an optimizer has no learning rate of its own.
    """
    given = list(layers(args, subcommand))
    for line in (
        _settle_optimizer(config, given),
        _settle_split(config, given),
        _settle_vocabulary(config, given),
        _settle_classes(config, given),
    ):
        if line:
            rank_zero_info(line)


def _by_hand(given: Sequence[Layer]) -> set[str]:
    """The keys that arguments give."""
    return {key for layer in given if layer.by_hand for key in layer.given}


def _settle_vocabulary(config: Namespace, given: Sequence[Layer]) -> str | None:
    """Give a language model as many tokens as the text has, if its number is not given or is that of another text."""
    network, data = config.get("model.init_args.network.init_args"), config.get("data")
    if network is None or "num_tokens" not in network or getattr(data, "class_path", None) != _CORPUS:
        return None
    by_hand = _by_hand(given)
    old = network.num_tokens
    if old is not None and ("data.train" not in by_hand or "model.network.num_tokens" in by_hand):
        return None
    corpus = TextCorpusDataModule(**data.init_args.as_dict())
    corpus.setup("fit")
    if corpus.num_tokens == old:
        return None
    network.num_tokens = corpus.num_tokens
    return f"num_tokens {corpus.num_tokens}, as in the text" + ("" if old is None else f" (the config has {old})")


def _settle_classes(config: Namespace, given: Sequence[Layer]) -> str | None:
    """Give a network as many classes and channels as the images have, where the command line names other images."""
    by_hand = _by_hand(given)
    data, task = config.get("data"), config.get("model.init_args")
    if not {"data", "data.class_path", "data.root"} & by_hand or task is None or "num_classes" not in task:
        return None
    module, _, name = str(getattr(data, "class_path", "")).rpartition(".")
    kind = getattr(importlib.import_module(module), name, None) if module else None
    if not inspect.isclass(kind) or not issubclass(kind, ImageDataModule):
        return None
    where = {key: data.init_args[key] for key in ("root", "image_size", "grayscale") if key in data.init_args}
    images = kind(**where) if isinstance(inspect.getattr_static(kind, "num_classes", None), property) else kind
    settled = []
    network = task.get("network.init_args")
    for place, key, value in (
        (task, "num_classes", images.num_classes),
        (network, "num_classes", images.num_classes),
        (network, "in_channels", images.num_channels),
    ):
        prefix = "model" if place is task else "model.network"
        if place is not None and key in place and place[key] != value and f"{prefix}.{key}" not in by_hand:
            settled.append(f"{key} {value} (the config has {place[key]})")
            place[key] = value
    return f"{' and '.join(dict.fromkeys(settled))}, as the images" if settled else None


# --- the optimizer ---------------------------------------------------------------------------------------------------


@dataclass
class _Origins:
    """For which class each setting of the optimizer was given."""

    kind: str | None = None
    before: str | None = None
    of: dict[str, str | None] = field(default_factory=dict)


def _origins(given: Sequence[Layer]) -> _Origins:
    found = _Origins()
    for layer in given:
        named = layer.given.get(OPTIMIZER, layer.given.get(f"{OPTIMIZER}.class_path"))
        if isinstance(named, str) and (kind := named.rpartition(".")[2]) != found.kind:
            found.before, found.kind = found.kind, kind
        prefix = f"{OPTIMIZER}."
        names = [key.removeprefix(prefix) for key in layer.given if key.startswith(prefix)]
        found.of.update({name: found.kind for name in names if name != "class_path"})
    return found


def _settle_optimizer(config: Namespace, given: Sequence[Layer]) -> str | None:
    origins = _origins(given)
    optimizer = config.get("model.init_args.optimizer")
    path = getattr(optimizer, "class_path", None)
    if origins.before is None or origins.kind is None or path is None or "init_args" not in optimizer:
        return None
    bound = _needs_bound(config, origins, given)
    own, kept = [], []
    for name, origin in origins.of.items():
        if name not in optimizer.init_args or origin == origins.kind or origin is None:
            continue
        old = optimizer.init_args[name]
        if _carries(name, origin, origins.kind, bounded=bound):
            kept.append(f"{name} {old}")
        else:
            optimizer.init_args[name] = new = _default(path, name)
            own.append(f"{name} {new} (for {origin} it was {old})")
    if "lr" not in origins.of:
        own.append(f"lr {_default(path, 'lr')}")
    if bound:
        config.model.init_args.gradient_clip_val = 1.0
        own.append("gradient_clip_val 1.0 (steps are as large as the gradient)")
    parts = [f"its own settings {', '.join(own)}"] * bool(own) + [f"{', '.join(kept)} as before"] * bool(kept)
    return f"optimizer {origins.kind} in place of {origins.before}: {'; '.join(parts)}" if parts else None


def _needs_bound(config: Namespace, origins: _Origins, given: Sequence[Layer]) -> bool:
    """Whether the gradient is to be bounded: steps are then of the size of the learning rate, as those before were.

    The penalty of weight decay is not bounded along with it, so it is dropped then.
    """
    chosen = origins.of.get("lr") == origins.kind or any("model.gradient_clip_val" in layer.given for layer in given)
    sizes_matter = origins.before in _ADAPTIVE and origins.kind in _PROPORTIONAL
    return sizes_matter and not chosen and "gradient_clip_val" in config.model.init_args


def _carries(name: str, old: str, new: str, *, bounded: bool) -> bool:
    if name == "weight_decay":
        return {old, new} <= _PENALIZES and not bounded
    if name == "lr" and bounded:
        return True
    return name in _HOW or {old, new} <= _ADAPTIVE


def _default(path: str, name: str) -> Any:
    kind: Any = getattr(torch.optim, path.rpartition(".")[2], None)
    default = inspect.Parameter.empty
    if kind is not None and path.startswith("torch.optim."):
        default = inspect.signature(kind).parameters[name].default
    if default is inspect.Parameter.empty:
        raise ValueError(
            f"expected {name} in `model.init_args.optimizer.init_args` for {path.rpartition('.')[2]}, got that of "
            f"another optimizer; give --model.init_args.optimizer.init_args.{name}"
        )
    return default


# --- the split -------------------------------------------------------------------------------------------------------


def _settle_split(config: Namespace, given: Sequence[Layer]) -> str | None:
    dataset: Any = None
    meant_for: dict[str, Any] = {}
    for layer in given:
        dataset = layer.given.get("data.dataset", dataset)
        for name in _OF_DATA & {key.removeprefix("data.") for key in layer.given}:
            meant_for[name] = None if layer.by_hand else dataset
    data = config.get("data.init_args")
    if dataset in DATASETS or data is None:
        return None
    dropped = []
    for name, origin in sorted(meant_for.items()):
        if origin not in (None, dataset) and data.get(name) is not None:
            dropped.append(f"{name} {data[name]} is the config's for {origin!r}")
            data[name] = None
    if not dropped:
        return None
    return f"{'; '.join(dropped)}: not used for {dataset!r}; give your own as arguments to change that"


# --- reading ---------------------------------------------------------------------------------------------------------


def _key(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "init_args")


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, each in value.items():
        parts = [prefix] * bool(prefix) + [str(name)] * (name != "init_args")
        flat |= _flat(".".join(parts), each)
    return flat


def _load(value: str) -> Any:
    """What the parser makes of a value, which may be a file; it has been read before, so nothing is wrong with it."""
    path = Path(value)
    try:
        is_file = path.suffix in (".yaml", ".yml", ".json") and path.is_file()
        return load(path.read_text(encoding="utf-8-sig") if is_file else value)
    except (yaml.YAMLError, OSError, ValueError):
        return value
