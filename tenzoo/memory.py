"""How much memory there is."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that this process may still take, by the machine and by the limit of its container; None if not known.

    Example:
        >>> free = free_memory()
        >>> free is None or free > 0
        True
    """
    known = [free for free in (_of_machine(), _of_container()) if free is not None]
    return min(known) if known else None


def in_gigabytes(size: int) -> str:
    """A size for a message.

    Example:
        >>> in_gigabytes(1_230_000_000), in_gigabytes(40_000_000)
        ('1.2 GB', '0.04 GB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e9:.1g} GB"


def _of_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _of_container() -> int | None:
    try:
        limit, used, details = (
            (_CONTROL_GROUP / name).read_text(encoding="ascii")
            for name in ("memory.max", "memory.current", "memory.stat")
        )
        cached = next(int(line.split()[1]) for line in details.splitlines() if line.startswith("file "))
        return int(limit) - int(used) + cached  # what files are cached in is given back
    except (OSError, ValueError, StopIteration):  # no such files, or "max"
        return None
