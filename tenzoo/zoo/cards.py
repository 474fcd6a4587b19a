"""Model cards: what was trained, on what, how, with which result; written from the folder of a run."""

import csv
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tenzoo.tasks import Task
from tenzoo.weight_files import load_torch
from tenzoo.zoo.description import describe, totals
from tenzoo.zoo.metrics import by_split

_ROWS = 8
"""Of the curve."""

_PLACES = frozenset({"--trainer.default_root_dir", "--data.root", "--ckpt_path", "--trainer.enable_progress_bar"})
"""Options that say where something lies, or only what is shown."""


def card(checkpoint: Path, title: str, task: Task) -> str:
    """The card of a checkpoint, in Markdown.

    Args:
        checkpoint: Its run has ``config.yaml``, ``metrics.csv``, ``metrics.json`` and ``environment.json``; what is not
            there is left out, and so are metrics of another checkpoint of the run.
        title: Its first line.
        task: With the trained weights.
    """
    run = checkpoint.parent.parent
    config = _config(run / "config.yaml")
    environment, judged = _json(run / "environment.json"), _json(run / "metrics.json")
    parts = [
        "---\nlibrary_name: tenzoo\ntags: [tensor-decomposition, pytorch-lightning]\n---",
        f"# {title}",
        "\n".join(f"- **{name}:** {text}" for name, text in _facts(config, task)),
    ]
    if judged and _is_of(judged, checkpoint):
        parts += ["## Metrics", f"Of {judged['weights']}.", _table(judged["metrics"])]
    if curve := _curve(run / "metrics.csv"):
        parts += ["## Training", curve]
    if environment:
        versions = ", ".join(f"{name} {environment[name]}" for name in ("tenzoo", "torch", "lightning", "python"))
        hardware = ", ".join(environment["gpus"]) or f"{environment['processor']}, {environment['threads']} threads"
        changed = " with changes" if environment.get("changed") else ""
        commit = f"; commit {environment['commit'][:12]}{changed}" if environment.get("commit") else ""
        parts.append(f"```bash\n{_command(environment['command'])}\n```\n\n{versions}; {hardware}{commit}.")
    return "\n\n".join(parts) + "\n"


def _command(words: Sequence[str]) -> str:
    """A command line without the places that it names, and without what is only shown.

    Example:
        >>> _command(["__main__.py", "fit", "--data.root=x", "--seed_everything", "1", "--ckpt_path", "a.ckpt"])
        'tenzoo fit --seed_everything 1'
    """
    kept, skip = ["tenzoo"], False
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        hidden = name.replace(".init_args", "") in _PLACES
        if not skip and not hidden:
            kept.append(word)
        skip = hidden and not equals
    return shlex.join(kept)


def _is_of(judged: Mapping[str, Any], checkpoint: Path) -> bool:
    """Whether metrics are those of a checkpoint: it was judged itself, or has the weights of the same step."""
    if judged["checkpoint"] == checkpoint.name:
        return True
    own = load_torch(checkpoint, "a checkpoint")["global_step"]
    other = checkpoint.with_name(str(judged["checkpoint"]))
    if judged["checkpoint"] is None:
        return bool(own == judged["step"])
    return other.is_file() and bool(load_torch(other, "a checkpoint")["global_step"] == own)


def _facts(config: Mapping[str, Any], task: Task) -> Iterator[tuple[str, str]]:
    layers = describe(task)
    number, dense = totals(layers)
    yield "task", type(task).__name__
    network = getattr(task, "network", None)
    if network is not None:
        yield "network", _said(task.hparams.get("network")) or type(network).__name__
    formats = sorted({layer.factorization for layer in layers if layer.factorization})
    yield "parameters", f"{number:,}, dense {dense:,}" + (f"; {', '.join(formats)}" if formats else "")
    if data := config.get("data"):
        yield "data", _said(_without_folders(data))
    yield "optimizer", _said(task.hparams.get("optimizer")) or "given in Python"
    for name in ("core_weight_decay", "norm_weight_decay", "bias_weight_decay"):
        if (decay := task.hparams.get(name)) is not None:
            yield name.replace("_", " "), f"{decay:g}"
    if (schedule := task.hparams.get("lr_scheduler")) is not None:
        yield "learning rate", _said(schedule) or str(schedule)
    methods = [] if task.sam is None else [f"SAM, ρ = {task.sam.rho:g}"]
    callbacks = config.get("trainer", {}).get("callbacks") or []
    names = [str(each.get("class_path")) for each in callbacks]
    ours = [name.startswith("tenzoo.callbacks.") and "Monitor" not in name for name in names]
    methods += [_said(each) for each, own in zip(callbacks, ours, strict=True) if own]
    yield "method", "; ".join(methods) or "plain"
    if precision := config.get("trainer", {}).get("precision"):
        yield "precision", str(precision)
    if "seed_everything" in config:
        yield "seed", str(config["seed_everything"])


def _without_folders(value: Any) -> Any:
    """Paths as the names of their files: where they lie is the user's affair."""
    if isinstance(value, Mapping):
        return {key: _without_folders(each) for key, each in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _said(value: Any) -> str:
    """A class and what was set for it, in a line."""
    if not isinstance(value, Mapping) or "class_path" not in value:
        return ""
    arguments = value.get("init_args") or {}
    given = (f"{key} {_said(each) or each}" for key, each in arguments.items() if each not in (None, False, {}, []))
    name = str(value["class_path"]).rpartition(".")[2]
    return f"{name} ({', '.join(given)})" if arguments else name


def _table(metrics: Mapping[str, float]) -> str:
    names, splits = by_split(metrics)
    rows = [["split", *names], ["---", *("---:" for _ in names)]]
    for split, values in splits.items():
        rows.append([split, *("" if value is None else f"{value:.4f}" for value in values)])
    return _markdown(rows)


def _curve(path: Path) -> str:
    """The metrics of validation at a few steps."""
    if not path.is_file():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [row for row in csv.DictReader(file) if any(name.startswith("val/") and row[name] for name in row)]
    if not lines:
        return ""
    names = [name for name in lines[0] if name.startswith("val/")]
    steps = {int(row["step"]): [row[name] for name in names] for row in lines if row["step"]}
    every = sorted(steps)
    if len(every) > 1 and steps[every[-1]] in [steps[step] for step in every[:-1]]:
        every.pop()  # of the best weights, which are judged again at the end
    number = min(_ROWS, len(every))
    chosen = [every[round(place * (len(every) - 1) / max(number - 1, 1))] for place in range(number)]
    rows = [["step", *names], *[["---:"] * (1 + len(names))]]
    rows += [[str(step + 1), *(f"{float(value):.4f}" if value else "" for value in steps[step])] for step in chosen]
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
