"""Checkpoints appear whole or not at all."""

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO

from tenzoo.atomic import TEMPORARY
from tenzoo.jobs import AtomicCheckpointIO, CheckpointWriteError
from tests.tasks.toy import Batches, Regression, assert_same_weights, trainer

STATE = {"state_dict": {"weight": torch.arange(50_000.0)}, "global_step": 3}


@contextmanager
def full_disk(limit):
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "new" / "last.ckpt"
    io.save_checkpoint(STATE, path)
    read = io.load_checkpoint(path, weights_only=True)
    assert read["global_step"] == 3
    assert read["state_dict"]["weight"].equal(STATE["state_dict"]["weight"])
    assert names(path.parent) == ["last.ckpt"]


def test_it_is_written_beside_its_place(tmp_path, monkeypatch):
    """A folder for temporary files on another file system would make the last step a copy."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("limit", [0, 1_000, 100_000, 200_000])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, limit):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(STATE, path)
    with full_disk(limit), pytest.raises(CheckpointWriteError, match="File too large") as caught:
        io.save_checkpoint({**STATE, "global_step": 4}, path)
    assert caught.value.filename == str(path)
    assert names(tmp_path) == ["last.ckpt"]
    assert io.load_checkpoint(path)["global_step"] == 3


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointWriteError, match="Read-only file system"):
        AtomicCheckpointIO().save_checkpoint({**STATE, "global_step": 4}, path)
    monkeypatch.undo()
    assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == 3


def test_an_object_that_cannot_be_saved_is_no_full_disk(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"function": lambda: 0}, tmp_path / "last.ckpt")
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_at_the_next_start(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"good")
    code = (
        "import os, signal, sys, torch\n"
        "from tenzoo.jobs import AtomicCheckpointIO\n"
        "class Deadly:\n    def __reduce__(self): os.kill(os.getpid(), signal.SIGKILL)\n"
        "AtomicCheckpointIO().save_checkpoint({'w': torch.zeros(100000), 'd': Deadly()}, sys.argv[1])"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "last.ckpt")], timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "last.ckpt").read_bytes() == b"good"
    assert any(path.name.startswith(TEMPORARY) for path in tmp_path.iterdir())
    AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "other.ckpt")
    assert names(tmp_path) == ["last.ckpt", "other.ckpt"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_a_task_uses_it_and_training_survives_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    """The disk fills up in mid-run: one clear error, and the checkpoint before resumes."""

    class Fills(ModelCheckpoint):
        full = False

        def _save_checkpoint(self, trainer, filepath):
            with full_disk(3000) if self.full and trainer.global_step >= 12 else nullcontext():
                super()._save_checkpoint(trainer, filepath)

    def fit(ckpt_path=None):
        torch.manual_seed(0)
        model = Regression()
        run = trainer(max_epochs=5, enable_checkpointing=True, callbacks=[Fills(tmp_path, filename="only")])
        run.fit(model, Batches(), Batches(seed=9), ckpt_path=ckpt_path)
        return model, run

    monkeypatch.setattr(Fills, "full", True)
    with pytest.raises(CheckpointWriteError, match="expected a checkpoint that can be written"):
        fit()
    monkeypatch.undo()
    assert names(tmp_path) == ["only.ckpt"]
    resumed, _ = fit(ckpt_path=tmp_path / "only.ckpt")
    (tmp_path / "only.ckpt").unlink()
    whole, run = fit()
    assert type(run.strategy.checkpoint_io) is AtomicCheckpointIO
    assert_same_weights(whole, resumed)


def test_a_plugin_of_the_user_stays(tmp_path):
    class Own(TorchCheckpointIO):
        pass

    for plugin in (Own(), AsyncCheckpointIO()):
        run = trainer(max_epochs=1, plugins=[plugin])
        run.fit(Regression(), Batches(), Batches(seed=9))
        assert run.strategy.checkpoint_io is plugin
