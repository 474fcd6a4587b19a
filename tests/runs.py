"""The folders that runs of the command line make."""

from pathlib import Path


def runs(root: Path | str) -> list[Path]:
    """All below a folder, the oldest first."""
    made = {path.parent: path.stat().st_mtime_ns for path in Path(root).rglob("config.yaml")}
    return sorted(made, key=lambda folder: made[folder])


def the_run(root: Path | str) -> Path:
    """The only one below a folder."""
    (folder,) = runs(root)
    return folder
