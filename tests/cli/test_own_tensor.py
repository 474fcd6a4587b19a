"""A file of one's own, from the command line: one line that names what is wrong with it, and nothing is left behind."""

import numpy as np
import pytest
import torch

from tenzoo.cli import main
from tenzoo.tasks import rank_search
from tests.runs import runs

CONFIG = """
trainer: {accelerator: cpu, max_steps: 2, enable_progress_bar: false, enable_model_summary: false,
          log_every_n_steps: 1, limit_val_batches: 0, num_sanity_val_steps: 0}
model: {class_path: CompletionTask, init_args: {factorization: cp, rank: 1}}
data: {class_path: CompletionDataModule, init_args: {dataset: mine.csv, observed_fraction: 1, validation_fraction: 0}}
"""
SIX = "0,0,0\n0,1,1\n1,0,2\n1,2,3\n2,1,4\n2,2,5\n"


def numbered(lines):
    return "\n".join(f"{number},{line}" for number, line in enumerate(lines.split()))


def run(folder, *words, command="fit"):
    (folder / "config.yaml").write_text(CONFIG)
    root = ["--trainer.default_root_dir", str(folder / "runs")]
    return main([command, "--config", str(folder / "config.yaml"), *root, *words])


@pytest.mark.parametrize(
    ("table", "words", "message"),
    [
        (SIX.replace("2,", "20000000,"), [], "as ids are; number them from 0 to 2, or give `shape`"),
        (SIX, ["--data.shape", "[20000000000,3]"], "number the indices of each mode without gaps, or lower `rank`"),
        (numbered(SIX + SIX), [], "like row numbers; leave the column"),
        (",user,film,stars\n" + numbered(SIX), [], "column 1 of `dataset`"),
        ("1,1,5\n1,2,4\n2,1,3\n", [], "got 1 to 2; subtract 1 if they count from 1"),
        (SIX.replace(",5", ",-999"), [], "got 1 times -999 where all others are from 0 to 4; write NaN for it"),
        ("user,rating,time\n0,1,5\n", [], "the value in the last column of `dataset`, got 'rating' before 'time'"),
    ],
)
def test_a_table_that_would_be_misread_ends_in_one_line(tmp_path, monkeypatch, capsys, table, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text(table)
    assert run(tmp_path, *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tenzoo: ")]
    assert line.startswith("tenzoo: error: expected ")
    assert message in line
    assert list((tmp_path / "runs").glob("*")) == []


def test_too_many_cells_to_complete_are_refused_and_the_held_out_ones_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text(SIX + "0,2,1\n2,0,2\n")
    words = ["--data.shape", "[40000,40000]", "--data.observed_fraction", "0.5"]
    assert run(tmp_path, *words) == 0
    (checkpoint,) = tmp_path.glob("runs/*/*/checkpoints/*.ckpt")
    words += ["--ckpt_path", str(checkpoint)]
    assert run(tmp_path, *words, command="predict") == 2
    assert "expected a choice of cells in `predict_index` for a tensor with 1599999996" in capsys.readouterr().err
    assert len(runs(tmp_path / "runs")) == 1
    assert run(tmp_path, *words, "--data.predict_index", "held_out", command="predict") == 0
    with np.load(runs(tmp_path / "runs")[1] / "completed.npz") as written:
        cores = torch.load(checkpoint, weights_only=True)["state_dict"]
        first, second = (cores[f"model.tensor.cores.{mode}"][:, 0].numpy() for mode in (0, 1))
        index = written["indices"]
        assert len(index) == 4
        np.testing.assert_allclose(written["values"], first[index[:, 0]] * second[index[:, 1]], rtol=1e-5)


def test_a_rank_that_the_data_choose_is_that_of_the_checkpoint(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(rank_search, "RANKS", (1, 2))
    monkeypatch.setattr(rank_search, "COUPLED", (0.0, 1e-3))
    np.save(tmp_path / "mine.npy", np.outer(np.arange(1.0, 13.0), np.arange(2.0, 12.0)))
    words = ["--model.rank=auto", f"--data.dataset={tmp_path / 'mine.npy'}", "--data.observed_fraction=0.8"]
    words += ["--data.validation_fraction=0.2", "--trainer.limit_val_batches=1.0"]
    assert run(tmp_path, *words) == 0
    (told,) = [line for line in caplog.messages if line.startswith("rank: auto takes rank: ")]
    (first,) = runs(tmp_path / "runs")
    (last,) = (first / "checkpoints").glob("*.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    assert f"rank: {checkpoint['hyper_parameters']['rank']}, core_weight_decay: " in told
    for command, more in (("predict", []), ("test", []), ("fit", ["--trainer.max_steps=4"])):
        assert run(tmp_path, *words, *more, f"--ckpt_path={last}", command=command) == 0
    assert len([line for line in caplog.messages if line.startswith("rank: auto")]) == 1
    steps = [torch.load(path, weights_only=True)["global_step"] for path in (first / "checkpoints").glob("*.ckpt")]
    assert max(steps) == 4  # the run went on in its folder
    assert run(tmp_path, *words, command="describe") == 2
    assert "got `rank` 'auto', which is chosen when training begins; give one" in capsys.readouterr().err
