"""How a command refuses its input: one line, nothing written, nothing changed."""

from pathlib import Path

from tenzoo.cli import main

MAX_LINE = 500


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, with what changes when it is written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns if path.is_file() else 0)
        for path in sorted(folder.rglob("*"))
    }


def refused(capsys, folder: Path, argv: list[str], words: list[str], code: int = 2) -> str:
    """Run a command that is refused, check how, and give its line."""
    before = snapshot(folder)
    capsys.readouterr()
    assert main(argv) == code
    error = capsys.readouterr().err
    assert snapshot(folder) == before
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, error
    assert lines[0].startswith("tenzoo: error: ")
    for word in words:
        assert word in lines[0]
    assert len(lines[0].replace(str(folder), "")) <= MAX_LINE
    return lines[0]
