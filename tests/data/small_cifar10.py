"""CIFAR-10 in its official format, but of few images."""

import hashlib
from pathlib import Path

import numpy as np

from tenzoo.data import CIFAR10DataModule, Images

NAMES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def write_cifar10(folder: Path, per_file: int = 20) -> dict[str, str]:
    """The files, of images that begin with their number; returns the digests."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    digests = {}
    for number, name in enumerate(NAMES):
        record = generator.integers(256, size=(per_file, 3073), dtype=np.uint8)
        record[:, 0] = np.arange(per_file) % 10
        record[:, 1] = number * per_file + np.arange(per_file)
        (folder / name).write_bytes(record.tobytes())
        digests[name] = hashlib.sha1(record.tobytes()).hexdigest()
    return digests


def write_small(root: Path, monkeypatch) -> None:
    """The files, which pass for the official ones."""
    digests = write_cifar10(root / "cifar-10-batches-bin")
    monkeypatch.setattr("tenzoo.data.images.cifar10_files.SHA1", digests)


def make(root: str, **changes) -> CIFAR10DataModule:
    return CIFAR10DataModule(root, **{"validation_size": 10, "batch_size": 16, "seed": 9, **changes})


def ready(root: str, **changes) -> CIFAR10DataModule:
    data = make(root, **changes)
    data.setup()
    return data


def numbers(images: Images) -> list[int]:
    return images.image[:, 0, 0, 0].tolist()


def file(root: str, name: str) -> Path:
    return Path(root) / "cifar-10-batches-bin" / name
