"""Files that appear whole or not at all."""

import fcntl
import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp-"
"""What the names of unfinished files begin with; a killed process may leave one."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file under another name, and give it its own name when it is complete and on the disk.

    The unfinished file lies beside the target, so that the last step is a rename within one file system, which happens
    wholly or not at all. It keeps the target's ending, which some writers look at. If anything fails, it is removed,
    and what was under the target's name before stays.

    Args:
        path: The target; a file that is there is replaced.

    Yields:
        An empty file to write to.

    Raises:
        OSError: If the folder cannot be written to, or the disk is full.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "plan.json"
        >>> with atomic_write(target) as unfinished:
        ...     _ = unfinished.write_text("{}")
        ...     target.exists()
        False
        >>> [file.name for file in target.parent.iterdir()]
        ['plan.json']
    """
    path = Path(path)
    unfinished = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    # Not tempfile's: its files can be read by their owner alone, also after they were renamed.
    descriptor = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        _lock(descriptor)
        yield unfinished
        os.fsync(descriptor)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    with suppress(OSError):  # some file systems cannot; the file itself is safe by now
        _sync(path.parent)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the unfinished files that killed processes left in a folder; those being written to now stay.

    Args:
        folder: Nothing is done where it does not exist, or cannot be written to.
    """
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_WRONLY)
            try:
                if _lock(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock that a process holds while it writes, and that ends with it; False if another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks, where nothing is known to be left over
        return False
    return True


def _sync(path: Path) -> None:
    """Wait until what was written is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unused(path: Path, mark: str = "-") -> Path:
    """The path, or with a number behind a mark one that is not there yet: another run may have made a file."""
    numbered = (path.with_stem(f"{path.stem}{mark}{number}") for number in itertools.count(1))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())
