"""The official binary files of CIFAR-10: fetched, unpacked, checked and read. Nothing in them is ever executed."""

import hashlib
import tarfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from tenzoo.data.images.batches import Images

ARCHIVE = "cifar-10-binary.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
"""The archive: its file name, its address, its digest, and the folder in it."""

SHA1 = {
    "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
}
"""The digests of the official files: the training set in its order, then the test set."""

_RECORD = 1 + 3 * 32 * 32
_LARGEST = 10_000 * _RECORD
"""Number of bytes of an official file."""


def fetch(root: Path, *, download: bool) -> None:
    """Unpacks the files that are missing, and downloads the archive if it is missing too.

    Args:
        root: Folder of the files, of the folder ``cifar-10-batches-bin`` or of the archive.
        download: Whether to download a missing archive.

    Raises:
        FileNotFoundError: If there is no archive and no download.
        ValueError: If the archive is not the official one.
    """
    if not _missing(root):
        return
    from torchvision.datasets.utils import check_integrity, download_url  # a slow import, about 1 s

    archive = root / ARCHIVE
    remedy = f"fetch {URL} on a machine with network and put it, or its unpacked files, there"
    if download:
        existed = root.exists()
        try:
            download_url(URL, root, md5=MD5)  # keeps a complete archive
        except (OSError, RuntimeError, HTTPException) as error:
            if not existed and root.is_dir() and not any(root.iterdir()):
                root.rmdir()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise FileNotFoundError(
                f"expected CIFAR-10's {', '.join(_missing(root))} in `root`, got {str(root)!r} without them, and "
                f"its download failed ({reason}); {remedy}"
            ) from error
    if not archive.is_file():
        raise FileNotFoundError(
            f"expected CIFAR-10's {', '.join(_missing(root))} in `root`, got {str(root)!r} without them; set "
            f"`download`, or {remedy}"
        )
    if not check_integrity(archive, MD5):
        raise ValueError(f"expected the official {ARCHIVE} in `root`, got another file; delete it and {remedy}")
    (root / FOLDER).mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for name in SHA1:
            if (content := tar.extractfile(f"{FOLDER}/{name}")) and not (root / FOLDER / name).is_file():
                part = root / FOLDER / f"{name}.part"
                part.write_bytes(content.read())
                part.replace(root / FOLDER / name)  # so that no incomplete file has this name


def read(root: Path) -> tuple[Images, Images]:
    """The training and the test set, in the order of the official files.

    Args:
        root: Folder of the files, or of a folder ``cifar-10-batches-bin`` with them.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not the official one.
    """
    if missing := _missing(root):
        raise FileNotFoundError(
            f"expected CIFAR-10's {', '.join(missing)} in `root`, got {str(root)!r} without them; call prepare_data() "
            f"first, or put {URL}, unpacked, there"
        )
    folder = next(folder for folder in _folders(root) if not _missing_in(folder))
    *train, test = (_read_file(folder / name, sha1) for name, sha1 in SHA1.items())
    return Images(torch.cat([part.image for part in train]), torch.cat([part.label for part in train])), test


def _read_file(path: Path, sha1: str) -> Images:
    size = path.stat().st_size
    if size > _LARGEST:
        raise ValueError(
            f"expected the official {path.name} of {_LARGEST} bytes in `root`, got {size} bytes in {str(path)!r}; "
            "delete it, so that it is unpacked or downloaded again"
        )
    content = path.read_bytes()
    actual = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    if actual != sha1:
        raise ValueError(
            f"expected the official {path.name} with SHA-1 {sha1} in `root`, got {len(content)} bytes with SHA-1 "
            f"{actual} in {str(path)!r}; delete it, so that it is unpacked or downloaded again"
        )
    record = np.frombuffer(content, dtype=np.uint8).reshape(-1, _RECORD)
    image = torch.from_numpy(record[:, 1:].copy()).view(-1, 3, 32, 32)
    return Images(image, torch.from_numpy(record[:, 0].astype(np.int64)))


def _folders(root: Path) -> tuple[Path, Path]:
    return root, root / FOLDER


def _missing(root: Path) -> list[str]:
    return min((_missing_in(folder) for folder in _folders(root)), key=len)


def _missing_in(folder: Path) -> list[str]:
    return [name for name in SHA1 if not (folder / name).is_file()]
