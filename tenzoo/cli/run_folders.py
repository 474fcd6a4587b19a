"""The checkpoints of runs by what they are: the last one, or the one with the best metric."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenzoo.cli.checkpoints import read_checkpoint

RUNS = "runs"
"""The folder of all runs of all configs, unless they say otherwise."""

_LAST = ("last*.ckpt", "preempted*.ckpt")
"""Names of checkpoints that keep the last state of a run."""


def checkpoint_of(given: str, root: str) -> str:
    """The file that a ``ckpt_path`` means.

    Args:
        given: A file, or ``best`` or ``last``: alone of the newest run, behind the path of a run folder of that run.
        root: The folder of all runs of the config.

    Raises:
        FileNotFoundError: If there is no such run, or no such checkpoint in it.
        ValueError: If no checkpoint of the run was chosen by a metric.
    """
    path = Path(given)
    if path.exists() or path.name not in ("best", "last"):
        return given
    folder = path.parent if len(path.parts) > 1 else _newest(Path(root), given)
    files = {file for pattern in _LAST for file in (folder / "checkpoints").glob(pattern)}
    files = files or set((folder / "checkpoints").glob("*.ckpt"))
    if not files:
        raise FileNotFoundError(f"expected a run with checkpoints in `ckpt_path`, got {str(folder)!r} without any")
    last = max(files, key=lambda file: file.stat().st_mtime)
    return str(last if path.name == "last" else _best(last))


def _newest(root: Path, given: str) -> Path:
    runs = [folder.parent for folder in root.rglob("checkpoints") if any(folder.glob("*.ckpt"))]
    if not runs:
        raise FileNotFoundError(f"expected a run in {str(root)!r} for `ckpt_path` {given!r}, got none")
    return max(runs, key=lambda folder: max(file.stat().st_mtime for file in (folder / "checkpoints").glob("*.ckpt")))


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
