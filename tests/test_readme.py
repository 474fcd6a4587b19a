"""The README as a newcomer takes it: its blocks are pasted, its commands are typed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tenzoo.cli import main
from tenzoo.cli.app import COMMANDS
from tests.test_docs import fenced

README = Path(__file__).parents[1] / "README.md"
BLOCKS = fenced(README, "python")
FIRST = BLOCKS[0]


def paste(code: str, folder: Path) -> str:
    """What a block prints in a fresh interpreter that stands in an empty folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}
    command = [sys.executable, "-W", "error", *IGNORED, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


IGNORED = ["-W", "ignore:`isinstance(treespec, LeafSpec)` is deprecated"]  # Lightning's own


def typed() -> list[list[str]]:
    """The words of every command of tenzoo."""
    lines = "\n".join(fenced(README, "bash")).replace("\\\n", " ").splitlines()
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "tenzoo"]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_as_pasted(tmp_path: Path, number: int):
    """Here one epoch in place of sixty, and one format in place of the best of all; as they are in the slow test."""
    if "peft" in BLOCKS[number]:
        pytest.importorskip("peft", reason="needs the extra text: pip install 'tenzoo[text]'")
    paste(BLOCKS[number].replace("max_epochs=60", "max_epochs=1").replace('"auto"', '"tt"'), tmp_path)


@pytest.mark.slow
def test_the_blocks_that_take_long_run_as_pasted(tmp_path: Path):
    long = [block for block in BLOCKS if "max_epochs=60" in block or '"auto"' in block]
    assert long[0] == FIRST
    assert len(long) == 2
    assert "total" in paste(long[1], tmp_path)


@pytest.mark.slow
def test_the_first_block_ends_with_the_figure_of_the_command_line(tmp_path: Path, monkeypatch, capsys):
    text = README.read_text(encoding="utf-8")
    (figure,) = re.findall(r"│ held out +│ +(0\.\d{4}) │", text)
    assert f"R² of {figure} on the held-out entries:\n\n```python" in text
    (printed,) = re.findall(r"held_out/r2 +│ +(0\.\d{4})", paste(FIRST, tmp_path))[:1]
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "covid_tucker"]) == 0
    assert re.findall(r"held out +│ +(0\.\d{4}) │", capsys.readouterr().out) == [printed]
    assert float(printed) == pytest.approx(float(figure), abs=0.002)  # of another processor


@pytest.mark.parametrize("words", typed(), ids=" ".join)
def test_a_command_is_valid(tmp_path: Path, monkeypatch, capsys, words: list[str]):
    """Commands that train are parsed; the others run, unless they need a run before them, on one model if on many."""
    words = [*words, "covid*"] if words == ["list"] else words
    monkeypatch.chdir(tmp_path)
    if words[0] not in COMMANDS:
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*words, "--print_config"])
        assert "class_path: tenzoo.tasks." in capsys.readouterr().out
    elif "--ckpt_path" in words:
        assert main(words) == 2
        assert "expected a run in 'runs' for `ckpt_path`" in capsys.readouterr().err
    else:
        assert main(words) == 0
