"""What a run was, as its checkpoints keep it, and what a run that resumes it may change.

A setting that makes another run of it is refused. One that a longer run may need, such as another machine, is allowed,
and said in a line if the numbers are then not those of one uninterrupted run.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    WeightAveraging,
)

from tenzoo.callbacks import NormDynamicsMonitor, RankWatch
from tenzoo.callbacks.groups import CoreCallback
from tenzoo.cli.checkpoints import (
    MISSING,
    check_same_network,
    check_same_settings,
    check_whole,
    differences,
    refusal,
)
from tenzoo.distributed import is_first_process

KEY = "tenzoo_run"

_STREAM = ("limit_train_batches", "overfit_batches", "reload_dataloaders_every_n_epochs")
_FIXED = ("precision", "sync_batchnorm", *_STREAM)
"""Arguments of the Trainer that change what a step does, or what it is given."""
_MACHINE = ("accelerator", "devices", "num_nodes", "strategy")
_LENGTH = ("max_epochs", "max_steps", "max_time")
_PLACES = {"root", "download", "dataset", "predict", "predict_index", "num_workers"}
"""Arguments of data modules that say where the data is: whether they are the same is told by what was read."""

_SAME = {"None": "", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
_UNSET = {"precision": "32-true", "limit_train_batches": "1.0", "overfit_batches": "0.0", "sync_batchnorm": "False"}

_WATCHES: tuple[type, ...] = (
    *(BasePredictionWriter, Checkpoint, DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, ModelSummary),
    *(NormDynamicsMonitor, ProgressBar, RankWatch, ThroughputMonitor, Timer),
)
"""Callbacks that leave the weights alone."""
_AVERAGES = (StochasticWeightAveraging, WeightAveraging)


def record(config: Namespace) -> dict[str, Any]:
    """What a checkpoint keeps of the configuration of its run, as builtins.

    Args:
        config: Of the subcommand, as parsed.
    """
    callbacks = config.trainer.get("callbacks") or []
    kinds = [(each, _class(each.class_path)) for each in (callbacks if isinstance(callbacks, list) else [callbacks])]
    return {
        "seed_everything": _plain(config.get("seed_everything")),
        "trainer": {name: _plain(config.trainer.get(name)) for name in (*_FIXED, *_MACHINE, *_LENGTH)},
        "callbacks": [
            {"known": _is_known(kind), "class_path": each.class_path, "init_args": _plain(each.get("init_args") or {})}
            for each, kind in kinds
            if not issubclass(kind, _WATCHES)
        ],
        "data": _plain(config.get("data")),
        "model": _plain(config.get("model")),
    }


def check_same_run(checkpoint: Mapping[str, Any], config: Namespace, path: Path) -> None:
    """Refuse to resume a run as another one; say what changes its numbers.

    Args:
        checkpoint: As read.
        config: Of ``fit``, as parsed.
        path: Of the checkpoint, for the messages.

    Raises:
        ValueError: For weights alone, or naming the first setting that differs and both values.
    """
    check_whole(checkpoint, path)
    then, now = checkpoint.get(KEY), record(config)
    check_same_settings(checkpoint, then.get("model") if isinstance(then, Mapping) else None, now["model"], path)
    if not isinstance(then, Mapping):  # made in Python, or by an older version
        _check_averages(checkpoint, now, path)
        return
    changed = list(_changes(then, now))
    for name, old, new, allowed in changed:
        if not allowed:
            raise refusal(path, name, old, new)
    changed += _new_length(then, now, config)
    if changed and is_first_process():
        said = ", ".join(f"{name} = {_text(new)} (was {_text(old)})" for name, old, new, _ in changed)
        print(f"tenzoo: resumed with {said}: numbers may differ from those of one run", file=sys.stderr)


def check_judged(checkpoint: Mapping[str, Any], config: Namespace, path: Path) -> None:
    """Refuse to judge weights in another network than the one that was trained.

    Args:
        checkpoint: As read.
        config: Of ``validate``, ``test`` or ``predict``, as parsed.
        path: Of the checkpoint, for the message.

    Raises:
        ValueError: Naming the first setting that differs and both values.
    """
    then = checkpoint.get(KEY)
    recorded = then.get("model") if isinstance(then, Mapping) else None
    check_same_network(checkpoint, recorded, _plain(config.get("model")), path)


_Change = tuple[str, Any, Any, bool]
"""Name, old and new value, and whether it is allowed."""


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[_Change]:
    seeds = then.get("seed_everything"), now["seed_everything"]
    if not any(isinstance(seed, bool) or seed is None for seed in seeds) and seeds[0] != seeds[1]:
        yield "seed_everything", *seeds, False
    trainer = then.get("trainer", {})
    for name, new in now["trainer"].items():
        if name in trainer and name not in _LENGTH and _standard(name, trainer[name]) != _standard(name, new):
            yield f"trainer.{name}", trainer[name], new, name in _MACHINE
    yield from _of_callbacks(then.get("callbacks", []), now["callbacks"])
    yield from _of_data(then.get("data"), now["data"])


def _of_callbacks(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[_Change]:
    before, after = ({each["class_path"]: each for each in callbacks} for callbacks in (then, now))
    for path in dict.fromkeys([*before, *after]):
        old, new = before.get(path), after.get(path)
        name = f"trainer.callbacks of {path.rpartition('.')[2]}"
        allowed = not (old or new or {})["known"]
        if old is None or new is None:
            yield (
                name,
                MISSING if old is None else old["init_args"],
                MISSING if new is None else new["init_args"],
                allowed,
            )
            continue
        for key, was, value in differences(old["init_args"], new["init_args"]):
            yield f"{name}: {key}", was, value, allowed


def _of_data(then: Any, now: Any) -> Iterator[_Change]:
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        return
    path = now.get("class_path")
    if then.get("class_path") != path:
        yield "data.class_path", then.get("class_path"), path, False
        return
    for key, old, new in differences(then.get("init_args", {}), now.get("init_args", {})):
        if key.partition(".")[0] not in _PLACES:
            yield f"data.init_args.{key}", old, new, not str(path).startswith("tenzoo.")


def _new_length(then: Mapping[str, Any], now: Mapping[str, Any], config: Namespace) -> list[_Change]:
    """Another length, where something follows a schedule over it."""
    planned = isinstance(config.get("model.init_args.lr_scheduler"), str) or any(
        each["init_args"].get("alpha_schedule") or isinstance(each["init_args"].get("swa_epoch_start"), float)
        for each in now["callbacks"]
    )
    old, new = then.get("trainer", {}), now["trainer"]
    names = [name for name in ("max_epochs", "max_steps") if name in old and old[name] != new[name]]
    return [(f"trainer.{name}", old[name], new[name], True) for name in names] if planned else []


def _check_averages(checkpoint: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """A checkpoint of averaged weights, resumed without averaging, would go on from the average."""
    states = checkpoint.get("callbacks")
    present = {each["class_path"].rpartition(".")[2] for each in now["callbacks"]}
    for key in states if isinstance(states, Mapping) else ():
        name = str(key).partition("{")[0]
        if name in {kind.__name__ for kind in (*_AVERAGES, *WeightAveraging.__subclasses__())} - present:
            raise refusal(path, f"trainer.callbacks of {name}", "one", "none")


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    kind: type = getattr(importlib.import_module(module), name)
    return kind


def _is_known(kind: type) -> bool:
    """Whether it is, or comes from, a callback of Lightning's or tenzoo's that acts on the weights."""
    bases = [base for base in kind.__mro__ if base not in (Callback, CoreCallback)]
    return any(base.__module__.startswith(("tenzoo.", "lightning.")) for base in bases)


def _standard(name: str, value: Any) -> str:
    text = _SAME.get(str(value), str(value)) if name == "precision" or value is None else str(value)
    return text or _UNSET.get(name, "")


def _text(value: Any) -> str:
    return "none" if value is MISSING else repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
