"""Files that are almost right: each is read as valid data, or refused in one line, in bounded time and memory.

Every input follows from a number. ``TENZOO_FUZZ_SECONDS=600 pytest -m slow tests/data/test_fuzz.py`` goes on for ten
minutes per reader; what it finds belongs into ``corpus/``, whose files are all read first.
"""

import io
import os
import random
import resource
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tenzoo.data import HumanNoise
from tenzoo.data.completion.files import read_entries, read_index
from tenzoo.data.images.cifar10_files import fetch, read
from tests.data.small_cifar10 import NAMES, write_cifar10

CORPUS = Path(__file__).parent / "corpus"
SECONDS = float(os.environ.get("TENZOO_FUZZ_SECONDS", "30"))
FEW = 150
"""Inputs of the fast part, per reader."""
MOST_SECONDS, MOST_MEGABYTES = 10, 1000
"""What one file may take, and all files together add to the memory of the process."""

EXTREMES = (
    b"\xff" * 8,
    b"\0" * 8,
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\0\0\0\0\0\0\xf0\x7f",
    b"\x80",
    b"\n",
    b"PK\3\4",
)
WORDS = (
    b"nan", b"inf", b"-1", b"1e400", b"99999999999999999999", b"9007199254740993", b",", b";", b"\n", b"\r", b"\0",
    b'"', b"0x10", b"1_0", b"\xef\xbb\xbf", b"(1000000000, 1000000000)", b"|O", b"<c16", b"True", b" ", b"-0.0",
    b"5e-324",
)  # fmt: skip


def mutated(content: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """One to four small changes."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        at, size = dice.randrange(len(data) + 1), dice.choice((1, 2, 4, 8, 16, 64))
        match dice.randrange(8):
            case 0:
                data[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size * 4]
            case 3:
                word = dice.choice(EXTREMES)
                data[at : at + len(word)] = word
            case 4:
                data[at : at + dice.choice((0, size))] = dice.choice(WORDS)
            case 5:
                del data[at:]
            case 6:
                other = dice.choice(others)
                start = dice.randrange(len(other))
                data[at : at + size] = other[start : start + size * 4]
            case 7:
                digits = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
                for place in dice.sample(digits, min(len(digits), 3)):
                    data[place] = dice.choice(b"0123456789")
        data = data or bytearray(b"x")
    return bytes(data)


def changed(path: Path, dice: random.Random, others: list[bytes]) -> bytes:
    """A file with small changes; often within a member of an archive, under a checksum that is right."""
    content = path.read_bytes()
    if not zipfile.is_zipfile(path) or dice.random() < 0.4:
        return mutated(content, others, dice)
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(buffer, "w") as copy:
        names = archive.namelist()
        chosen = dice.choice(names)
        for name in names:
            member = archive.read(name)
            copy.writestr(name, mutated(member or b"x", others, dice) if name == chosen else member)
    return buffer.getvalue()


def check_refusal(error: Exception, named: str) -> None:
    text = str(error)
    assert text.startswith("expected "), text
    assert named in text, text
    assert "\n" not in text, text
    assert "; " in text, text
    assert len(text) < 1000, text


def check_entries(path: Path) -> bool:
    try:
        entries, shape = read_entries(path, None)
    except (ValueError, FileNotFoundError) as error:
        check_refusal(error, "`dataset`")
        return False
    index = entries.index.numpy()
    assert entries.index.dtype == torch.int64
    assert entries.value.dtype == torch.float32
    assert index.shape == (len(entries), len(shape))
    assert len(entries) >= 1
    assert len(shape) >= 2
    assert (index >= 0).all()
    assert (index < np.array(shape)).all()
    assert entries.value.isfinite().all()
    order = np.lexsort(index.T[::-1])
    assert (order == np.arange(len(entries))).all()
    assert (index[1:] != index[:-1]).any(axis=1).all()
    return True


def check_index(path: Path) -> bool:
    if path.suffix not in (".csv", ".npz"):
        return False
    try:
        index = read_index(path, (6, 5, 4))
    except (ValueError, FileNotFoundError) as error:
        check_refusal(error, "`predict_index`")
        return False
    assert index.dtype == torch.int64
    assert index.shape[1] == 3
    assert ((index >= 0) & (index < torch.tensor([6, 5, 4]))).all()
    return True


def check_labels(path: Path) -> bool:
    if path.suffix != ".npz":
        return False
    try:
        labels = HumanNoise(str(path)).noisy(torch.arange(20) % 10, num_classes=10, generator=np.random.default_rng(0))
    except (ValueError, FileNotFoundError) as error:
        check_refusal(error, "`path`")
        return False
    assert labels.dtype == torch.int64
    assert labels.shape == (20,)
    assert ((labels >= 0) & (labels < 10)).all()
    return True


def completion_file(folder: Path, number: int) -> bool:
    dice = random.Random(number)
    files = sorted(CORPUS.iterdir())
    chosen = dice.choice(files)
    path = folder / f"x{chosen.suffix}"
    path.write_bytes(changed(chosen, dice, [file.read_bytes() for file in files]))
    return check_entries(path) | check_index(path) | check_labels(path)


def cifar_folder(folder: Path, number: int) -> bool:
    """A folder of files of which one or two were changed, cut, exchanged, removed, or replaced by an archive."""
    dice = random.Random(number)
    whole = folder.parent / "whole"
    if not whole.exists():
        write_cifar10(whole, per_file=2)
    root = folder / "cifar10"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root / dice.choice((".", "cifar-10-batches-bin")))
    place = next(root.rglob(NAMES[0])).parent
    whole_still = True
    for name in dice.sample(NAMES, dice.randint(1, 2)):
        file = place / name
        before = file.read_bytes()
        match dice.randrange(5):
            case 0 | 1:
                file.write_bytes(mutated(before, [before], dice))
            case 2:
                file.unlink()
            case 3:
                file.unlink()
                file.mkdir()
            case 4:
                file.write_bytes((whole / dice.choice(NAMES)).read_bytes())
        whole_still &= file.is_file() and file.read_bytes() == (whole / name).read_bytes()
    if dice.random() < 0.3:
        (root / "cifar-10-binary.tar.gz").write_bytes(dice.randbytes(dice.choice((0, 1, 100))))
    try:
        fetch(root, download=False)
        train, test = read(root)
    except (ValueError, FileNotFoundError) as error:
        check_refusal(error, "`root`")
        assert not whole_still
        return False
    assert whole_still
    assert train.image.shape == (10, 3, 32, 32)
    assert test.label.tolist() == [0, 1]
    return True


READERS = {"completion": completion_file, "cifar10": cifar_folder}


def megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run(read_one: Callable[[Path, int], bool], folder: Path, numbers) -> dict[str, float]:
    """Read each of the inputs, and tell what was read and refused."""
    (folder / "work").mkdir()
    before, accepted, count, slowest = megabytes(), 0, 0, 0.0
    for number in numbers:
        start = time.process_time()
        try:
            accepted += read_one(folder / "work", number)
        except BaseException as error:
            raise AssertionError(f"input {number}: {type(error).__name__}: {error}") from error
        took, count = time.process_time() - start, count + 1
        slowest = max(slowest, took)
        assert took < MOST_SECONDS, f"input {number} took {took:.1f} s"
    assert megabytes() - before < MOST_MEGABYTES
    return {"inputs": count, "accepted": accepted, "slowest_s": round(slowest, 3), "added_mb": megabytes() - before}


@pytest.fixture
def digests(tmp_path, monkeypatch):
    monkeypatch.setattr("tenzoo.data.images.cifar10_files.SHA1", write_cifar10(tmp_path / "for_digests", per_file=2))


@pytest.mark.parametrize("name", sorted(path.name for path in CORPUS.iterdir()))
def test_the_corpus(tmp_path, name):
    path = tmp_path / name
    shutil.copy(CORPUS / name, path)
    assert check_entries(path) | check_index(path) | check_labels(path) != name.startswith("refused")


@pytest.mark.usefixtures("digests")
@pytest.mark.parametrize("reader", READERS)
def test_files_that_are_almost_right(tmp_path, reader):
    told = run(READERS[reader], tmp_path, range(FEW))
    assert 0 < told["accepted"] < FEW  # else the changes are too large, or too small


@pytest.mark.slow
@pytest.mark.usefixtures("digests")
@pytest.mark.parametrize("reader", READERS)
def test_files_that_are_almost_right_for_long(tmp_path, reader):
    end = time.monotonic() + SECONDS

    def numbers():
        number = FEW
        while time.monotonic() < end:
            yield number
            number += 1

    print(f"\n{reader}: {run(READERS[reader], tmp_path, numbers())}")
