"""Run folders: their names, and the checkpoints in them by what they are, the last or the one with the best metric."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tenzoo.callbacks import DeviationAwareScaling, Rebalance
from tenzoo.cli.checkpoints import read_checkpoint
from tenzoo.zoo import catalog

RUNS = "runs"
"""The folder of all runs of all configs, unless they say otherwise."""

_LAST = ("last*.ckpt", "preempted*.ckpt")
"""Names of checkpoints that keep the last state of a run."""

_FOUND = frozenset({"sam", "asam", "das", "das_gauge_fixed", "rebalance"})
"""Methods that are named by what the task and the callbacks do, whatever the files are called."""

_LONGEST = 80
"""Characters of a part of a name: file systems take 255."""


# --- names ---------------------------------------------------------------------------------------------------------


def name_of(configs: Sequence[str], task: object, callbacks: Iterable[object], seed: object) -> str:
    """The name that the runs of one experiment share: ``CONFIG-METHOD-sSEED``.

    Args:
        configs: Paths of the configs that were composed.
        task: The task; SAM is found there.
        callbacks: Those of the Trainer; DAS and others are found there.
        seed: ``seed_everything``, or False.

    Example:
        >>> from tenzoo.zoo.catalog import find
        >>> name_of([str(find("covid_tucker")), str(find("methods/adam"))], None, [DeviationAwareScaling(0.1)], 42)
        'covid_tucker-adam+das-s42'
        >>> name_of([], None, [], False)
        'run-plain-unseeded'
    """
    seeded = isinstance(seed, int) and not isinstance(seed, bool)
    return f"{config_of(configs)}-{_methods(configs, task, callbacks)}-{f's{seed}' if seeded else 'unseeded'}"


def config_of(configs: Sequence[str]) -> str:
    """CONFIG in that name: the first config that is a model, or ``run`` if there is none.

    A ``config.yaml`` of a run is the config of that run.
    """
    first = _first(configs)
    if first is None:
        return "run"
    run = _parsed(first.parent.parent.name) if first.name.startswith("config") else None
    return run or _part(first.stem)


def _first(configs: Sequence[str]) -> Path | None:
    paths = (Path(each).resolve() for each in configs)
    return next((path for path in paths if not _is_part(path)), None)


def _is_part(path: Path) -> bool:
    root = catalog.folder().resolve()
    return root in path.parents and catalog.is_part(path.relative_to(root).with_suffix("").as_posix())


def _methods(configs: Sequence[str], task: object, callbacks: Iterable[object]) -> str:
    first = _first(configs)
    others = (path for each in configs if (path := Path(each).resolve()) != first)
    names = [_part(path.stem).replace("-", "_") for path in others if not (_is_part(path) and path.stem in _FOUND)]
    sam = getattr(task, "sam", None)
    if sam is not None:
        names.append("asam" if sam.adaptive else "sam")
    for each in callbacks:
        if isinstance(each, DeviationAwareScaling):
            names.append("das_gauge_fixed" if each.gauge_fixed else "das")
        elif isinstance(each, Rebalance):
            names.append("rebalance")
    return "+".join(dict.fromkeys(names))[:_LONGEST] or "plain"


def _part(text: str) -> str:
    """A text as a part of a file name."""
    return re.sub(r"[^\w.+-]+", "_", text)[:_LONGEST]


def _parsed(name: str) -> str | None:
    """CONFIG in the name of an experiment; None if it is none."""
    found = re.fullmatch(r"(.+)-[^-]+-(?:s\d+|unseeded)", name)
    return None if found is None else found[1]


# --- runs ----------------------------------------------------------------------------------------------------------


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint, with the folder above it; None if the checkpoint lies elsewhere.

    Example:
        >>> run_of(Path("downloads/last.ckpt"))
    """
    folder = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or not (folder / "config.yaml").is_file():
        return None
    return folder if len(folder.parts) > 2 and ".." not in folder.parts else folder.resolve()


def checkpoint_of(given: str, root: str, config: str | None = None) -> str:
    """The file that a ``ckpt_path`` means.

    Args:
        given: A file, or ``best`` or ``last``: alone of the newest run, behind the path of a run folder of that run.
        root: The folder of all runs.
        config: CONFIG in the names of the runs that are looked at; None for any.

    Raises:
        FileNotFoundError: If there is no such run, or no such checkpoint in it.
        ValueError: If no checkpoint of the run was chosen by a metric.
    """
    path = Path(given)
    if path.exists() or path.name not in ("best", "last"):
        return given
    folder = path.parent if len(path.parts) > 1 else _newest(Path(root), given, config)
    files = {file for pattern in _LAST for file in (folder / "checkpoints").glob(pattern)}
    files = files or set((folder / "checkpoints").glob("*.ckpt"))
    if not files:
        raise FileNotFoundError(f"expected a run with checkpoints in `ckpt_path`, got {str(folder)!r} without any")
    last = max(files, key=lambda file: file.stat().st_mtime)
    return str(last if path.name == "last" else _best(last))


def _newest(root: Path, given: str, config: str | None) -> Path:
    runs = list(_runs(root, config))
    if not runs:
        told = "" if config is None else f" of {config!r}"
        raise FileNotFoundError(f"expected a run{told} in {str(root)!r} for `ckpt_path` {given!r}, got none")
    return max(runs, key=lambda folder: max(file.stat().st_mtime for file in (folder / "checkpoints").glob("*.ckpt")))


def _runs(root: Path, config: str | None) -> Iterator[Path]:
    """The folders of runs with checkpoints: of a config, or of any name in a folder that the user chose for them."""
    for folder in (each.parent for each in root.rglob("checkpoints") if any(each.glob("*.ckpt"))):
        parts = folder.relative_to(root).parts
        name = _parsed(folder.parent.name)
        elsewhere = name is None and (len(parts) < 2 or config in parts or root != Path(RUNS))
        if config in (None, name) or elsewhere:
            yield folder


def _best(last: Path) -> Path:
    """The file with the best metric, as the last state of the run knows it; the folder may have moved."""
    callbacks: Any = read_checkpoint(last).get("callbacks", {})
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(state, Mapping) and state.get("monitor") is not None and state.get("best_model_path"):
            best = last.parent / Path(str(state["best_model_path"])).name
            if best.is_file():
                return best
            raise FileNotFoundError(f"expected {str(best)!r} for `ckpt_path` best, got no such file")
    raise ValueError(
        f"expected a ModelCheckpoint with a `monitor` in the run for `ckpt_path` best, got none in {str(last.parent)!r}"
    )
