"""Files appear whole or not at all."""

import os
import signal
import subprocess
import sys

import pytest

from tenzoo.atomic import TEMPORARY, atomic_write, remove_leftovers


def test_a_file_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "last.ckpt"
    with atomic_write(target) as unfinished:
        unfinished.write_bytes(b"new")
        assert unfinished.parent == tmp_path  # a rename within one file system
        assert unfinished.suffix == ".ckpt"
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_if_writing_fails(tmp_path, error):
    target = tmp_path / "last.ckpt"
    target.write_bytes(b"old")

    def fail():
        with atomic_write(str(target)) as unfinished:
            unfinished.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    target, done = tmp_path / "plan.json", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append(target.exists()), fsync(descriptor)))
    with atomic_write(target) as unfinished:
        unfinished.write_text("{}")
    assert done == [False, True]  # the file before it has its name, the folder after


def test_others_may_read_the_file_as_any_other(tmp_path):
    (plain := tmp_path / "plain").write_text("")
    with atomic_write(tmp_path / "target") as unfinished:
        unfinished.write_text("")
    assert (tmp_path / "target").stat().st_mode == plain.stat().st_mode


def test_a_killed_process_leaves_the_old_file_and_one_to_be_known_by_its_name(tmp_path):
    (target := tmp_path / "last.ckpt").write_bytes(b"old")
    code = (
        "import os, signal; from tenzoo.atomic import atomic_write\n"
        f"with atomic_write({str(target)!r}) as unfinished:\n"
        "    unfinished.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    (left,) = [file for file in tmp_path.iterdir() if file != target]
    assert left.name.startswith(TEMPORARY)
    with atomic_write(target) as unfinished:  # is being written to, and stays
        unfinished.write_bytes(b"new")
        remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == {target, unfinished}
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == b"new"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "none" / "plan.json").__enter__()
