"""A machine that fails: one line, and the last good checkpoint goes on."""

import errno
import os
import signal
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from tenzoo.cli import main
from tests.jobs.test_signals import CONFIG, Hooked
from tests.runs import runs


@pytest.fixture
def fit(tmp_path):
    """The command line on a file of the user's."""
    generator = np.random.default_rng(0)
    np.save(tmp_path / "mine.npy", generator.normal(size=(6, 5, 4)))
    config = tmp_path / "config.yaml"
    text = CONFIG.replace("ROOT", str(tmp_path / "runs")).replace("dataset: il2", f"dataset: {tmp_path}/mine.npy")
    config.write_text(
        text.replace("batch_size: 500", "batch_size: 20").replace("save_last: true", "every_n_train_steps: 1")
    )
    handler = signal.getsignal(signal.SIGTERM)
    yield lambda *words: main(["fit", "--config", str(config), *words])
    signal.signal(signal.SIGTERM, handler)  # a logger that fails keeps Lightning from doing so


def one_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert len(lines) == 1, lines
    return lines[0]


def only_checkpoint(tmp_path):
    (path,) = (runs(tmp_path / "runs")[0] / "checkpoints").iterdir()
    return path


@pytest.mark.sampled(2)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_checkpoint_that_cannot_be_written(tmp_path, fit, capsys, monkeypatch, number):
    assert fit() == 0
    whole = Hooked.weights
    runs(tmp_path / "runs")[0].rename(tmp_path / "whole")
    save = torch.save

    def full(checkpoint, file):
        if checkpoint["global_step"] == 5:
            file.write(b"half of it")
            raise OSError(number, os.strerror(number))
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", full)
    capsys.readouterr()
    assert fit() == 1
    line = one_line(capsys)
    assert line.startswith("tenzoo: error: expected a checkpoint that can be written, got ")
    assert os.strerror(number) in line
    assert "step=5.ckpt" in line
    monkeypatch.undo()
    last = only_checkpoint(tmp_path)
    assert last.name == "epoch=1-step=4.ckpt"
    assert fit("--ckpt_path", str(last)) == 0
    assert Hooked.weights.equal(whole)


def test_an_error_of_the_system_in_code_of_the_user_keeps_its_place(fit, monkeypatch):
    def denied(self, *_):
        raise PermissionError(errno.EACCES, "Permission denied", "/x/y")

    monkeypatch.setattr(Hooked, "on_train_end", denied)
    with pytest.raises(PermissionError, match="/x/y"):
        fit()


def test_logs_that_cannot_be_written(tmp_path, fit, capsys, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.csv_logs.ExperimentWriter.NAME_METRICS_FILE", "/dev/full")
    assert fit() == 1
    assert one_line(capsys) == "tenzoo: error: No space left on device"


def test_logs_that_cannot_be_written_are_named(fit, capsys, monkeypatch):
    full = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv"))
    monkeypatch.setattr("lightning.pytorch.loggers.csv_logs.ExperimentWriter.log_metrics", full)
    assert fit() == 1
    assert one_line(capsys) == "tenzoo: error: No space left on device: metrics.csv"


def test_data_that_vanished_before_the_resume(tmp_path, fit, capsys):
    assert fit("--trainer.max_steps", "4") == 0
    last = only_checkpoint(tmp_path)
    before = last.read_bytes()
    (tmp_path / "mine.npy").unlink()
    capsys.readouterr()
    assert fit("--ckpt_path", str(last)) == 2
    assert "mine.npy" in one_line(capsys)
    assert last.read_bytes() == before
    assert len(runs(tmp_path / "runs")) == 1


def test_data_that_changed_before_the_resume(tmp_path, fit, capsys):
    assert fit("--trainer.max_steps", "4") == 0
    last = only_checkpoint(tmp_path)
    np.save(tmp_path / "mine.npy", np.load(tmp_path / "mine.npy") + 1)
    capsys.readouterr()
    assert fit("--ckpt_path", str(last)) == 2
    assert "of the checkpoint" in one_line(capsys)
