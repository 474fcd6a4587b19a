"""Files that would run code if they were unpickled, or ask for far more memory than they are long."""

import resource
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def memory_bomb(path: Path, kind: str) -> None:
    """Write a small file of ``torch.save`` that asks for 256 MiB or more, in one of several ways."""
    many = 2**26
    if kind == "expanded":
        torch.save({"state_dict": {"w": torch.zeros(1).expand(many)}, "global_step": 0}, path)
        return
    torch.save({"state_dict": {"w": torch.zeros(many if kind == "compressed" else 4)}, "global_step": 0}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    method = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for name, data in records.items():
            archive.writestr(name, PICKLES[kind] if name.endswith("data.pkl") and kind in PICKLES else data)


PICKLES = {
    "bytearray": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xe4\x0bT\x02\x85R.",
    "buffer": b"\x80\x02ctorch\nFloatTensor\n\x8a\x05\x00\xe4\x0bT\x00\x85R.",
}
"""Ask for 10 and 1.4 gigabytes by a number alone."""
BOMBS = ("compressed", "expanded", *PICKLES)


@contextmanager
def little_memory(more: int = 2**27) -> Iterator[None]:
    """Let this process take only so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
