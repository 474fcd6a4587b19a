"""Each example runs as its docstring says, says nothing beside its figure, and the figure is sane."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def lines_of(name: str, *args: str, cwd: Path) -> list[list[str]]:
    """What a script prints, line by line and word by word."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not list(cwd.glob("*")) or args, "the example left something behind"
    return [line.split() for line in done.stdout.splitlines()]


def test_every_example_is_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f'lines_of("{script.stem}"' in source


@pytest.mark.slow
def test_das_in_plain_torch(tmp_path: Path):
    _, plain, weak, strong = lines_of("das_in_plain_torch", cwd=tmp_path)
    assert [row[:2] for row in (plain, weak, strong)] == [["alpha", "0"], ["alpha", "0.1"], ["alpha", "0.5"]]
    before, after, error = zip(*(map(float, row[2:]) for row in (plain, weak, strong)), strict=True)
    assert len(set(before)) == 1
    assert before[0] > after[0] > 1.2 * after[1] > 2.4 * after[2]
    assert max(error) < 0.1


@pytest.mark.slow
def test_adapt_a_vit(tmp_path: Path):
    _, frozen, adapted = lines_of("adapt_a_vit", cwd=tmp_path)
    assert [row[:2] for row in (frozen, adapted)] == [["frozen", "0"], ["adapted", "1,788"]]
    assert float(frozen[2]) < 0.7 < 0.95 < float(adapted[2])


@pytest.mark.slow
def test_own_core_provider(tmp_path: Path):
    _, plain, sam, das = lines_of("own_core_provider", cwd=tmp_path)
    assert [row[0] for row in (plain, sam, das)] == ["plain", "SAM", "DAS"]
    before, after, loss = zip(*(map(float, row[1:]) for row in (plain, sam, das)), strict=True)
    assert len(set(before)) == 1
    assert before[0] > after[0] > 1.5 * max(after[1:])
    assert all(38 < value < 44 for value in loss)  # the noise alone makes 40


@pytest.mark.slow
def test_spectral_convolution(tmp_path: Path):
    group, _, plain, sam, das = lines_of("spectral_convolution", cwd=tmp_path)
    assert group == ["spectral.weight:", "4", "cores"]
    assert [row[0] for row in (plain, sam, das)] == ["Adam", "SAM", "DAS"]
    before, after = zip(*(map(float, row[1::2]) for row in (plain, sam, das)), strict=True)
    assert len(set(before)) == 1
    assert len(set(after)) == 3
    assert before[0] > 90 > 5 > max(after)


@pytest.mark.slow
def test_compress_your_network(tmp_path: Path):
    pytest.importorskip("onnxruntime", reason="writes an ONNX file; pip install 'tenzoo[export]'")
    *table, file = lines_of("compress_your_network", cwd=tmp_path)
    total = next(row for row in table if "total" in row)
    parameters, dense = (int(word.replace(",", "")) for word in total if word[0].isdigit())
    assert parameters <= 0.4 * dense == 0.4 * 269_722
    assert file[0] == "resnet20.onnx:"
    assert float(file[1]) == pytest.approx(4 * parameters / 1e3, rel=0.1)


def test_tensorized_layer(tmp_path: Path):
    _, dense, tensorized = lines_of("tensorized_layer", cwd=tmp_path)
    assert (dense[:2], tensorized[0]) == (["dense", "21,124"], "tensorized")
    assert int(tensorized[1].replace(",", "")) * 5 < 21_124
    assert min(float(dense[2]), float(tensorized[2])) > 0.9


@pytest.mark.slow
def test_complete_your_csv(tmp_path: Path):
    train, held_out, summary, *cells = lines_of("complete_your_csv", cwd=tmp_path)
    assert 0.8 < float(train[-1]) < 0.9
    assert 0.75 < float(held_out[-1]) < 0.9  # rounding and noise leave about 0.85
    assert (held_out[2], held_out[5]) == ("436", "held_out")
    assert summary[:3] == ["completed", "24440", "cells"]
    assert len(cells) == 5
    assert all(len(cell.split(",")) == 3 and 0 < float(stars) < 6 for cell, stars in cells)


def test_complete_ones_own_csv(tmp_path: Path):
    path = tmp_path / "table.csv"
    cells = [(row, column) for row in range(12) for column in range(12) if row != column]
    rows = "".join(f"{row},{column},{(row + 1) * (column + 1)}\n" for row, column in cells)
    path.write_text(
        f"row,column,product\n{rows}"
    )  # without names the first line, 0,1,2, might be one of numbers for them
    train, held_out, summary, *diagonal = lines_of("complete_your_csv", str(path), cwd=tmp_path)
    assert min(float(train[-1]), float(held_out[-1])) > 0.9
    assert summary[:6] == ["completed", "12", "cells", "of", "12", "×"]
    assert [cell for cell, _ in diagonal] == ["0,0", "1,1", "2,2", "3,3", "4,4"]
    assert abs(float(diagonal[3][1]) - 16) < 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_path_is_named(tmp_path: Path):
    command = [sys.executable, str(EXAMPLES / "complete_your_csv.py"), "no.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("FileNotFoundError")
    assert "no.csv" in done.stderr.splitlines()[-1]
