import hashlib
import os
import tarfile
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision.datasets.utils

from tenzoo.data import CIFAR10DataModule
from tests.data.small_cifar10 import NAMES, file, make, ready

REAL = os.environ.get("TENZOO_CIFAR10")


def test_the_official_format_is_read_byte_by_byte(root):
    splits = ready(root, validation_size=0).splits
    for split, names in {"train": NAMES[:5], "test": NAMES[5:]}.items():
        content = b"".join(file(root, name).read_bytes() for name in names)
        assert splits[split].image.shape == (len(content) // 3073, 3, 32, 32)
        assert splits[split].image.dtype == torch.uint8
        assert splits[split].label.dtype == torch.int64
        for i, label in enumerate(splits[split].label.tolist()):
            record = content[3073 * i : 3073 * (i + 1)]
            assert label == record[0]
            assert splits[split].image[i].numpy().tobytes() == record[1:]
        green = content[1 + 1024 + 32 * 5 + 7]  # the first image's, in row 5 and column 7
        assert splits[split].image[0, 1, 5, 7] == green


def test_the_files_may_lie_in_the_root_itself(root):
    expected = ready(root).state_dict()
    data = ready(str(Path(root) / "cifar-10-batches-bin"))
    assert data.state_dict() == expected
    assert (data.num_classes, data.image_shape) == (10, (3, 32, 32))


@pytest.mark.parametrize("change", ["altered", "truncated", "empty"])
def test_a_file_that_is_not_the_official_one(root, change):
    path = file(root, "data_batch_3.bin")
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes({"altered": bytes(content), "truncated": content[:-1], "empty": b""}[change])
    message = rf"official data_batch_3.bin with SHA-1 \w+ in `root`, got {path.stat().st_size} bytes .*; delete it"
    with pytest.raises(ValueError, match=message) as caught:
        ready(root)
    assert "\n" not in str(caught.value)


def publish(root: str, monkeypatch) -> Path:
    """An archive of the files as the official one is laid out; the files themselves are removed."""
    archive = Path(root) / "published.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(Path(root) / "cifar-10-batches-bin", "cifar-10-batches-bin")
    monkeypatch.setattr("tenzoo.data.images.cifar10_files.MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    for name in NAMES:
        file(root, name).unlink()
    return archive


def no_network(*args, **kwargs):
    raise URLError("[Errno -3] Temporary failure\nin name resolution")


def test_nothing_is_downloaded_where_the_files_are(root, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", no_network)
    make(root).prepare_data()


def test_the_archive_is_downloaded_and_unpacked(root, monkeypatch):
    expected = ready(root).state_dict()
    archive = publish(root, monkeypatch)
    requests = []

    def retrieve(url, filename):
        requests.append(url)
        Path(filename).write_bytes(archive.read_bytes())

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", retrieve)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, max_hops: url)
    data = make(root)
    data.prepare_data()
    data.setup()
    assert data.state_dict() == expected
    assert requests == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
    data.prepare_data()
    assert len(requests) == 1


def test_an_archive_in_the_root_is_unpacked_without_network(root, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    publish(root, monkeypatch).rename(Path(root) / "cifar-10-binary.tar.gz")
    file(root, NAMES[0]).write_bytes(b"mine")  # is not overwritten: setup will say what is wrong with it
    make(root, download=False).prepare_data()
    assert file(root, NAMES[0]).read_bytes() == b"mine"
    assert sorted(path.name for path in file(root, "").iterdir()) == NAMES


@pytest.mark.parametrize("present", [NAMES[:2], []])
def test_no_files_and_no_network(root, monkeypatch, present):
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", no_network)
    for name in set(NAMES) - set(present):
        file(root, name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        make(root).prepare_data()
    message = str(caught.value)
    assert "\n" not in message
    assert f"expected CIFAR-10's {', '.join(NAMES[len(present) :])} in `root`, got {root!r} without them" in message
    assert "URLError" in message
    assert "fetch https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz on a machine with network and put" in message


def test_a_failed_download_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", no_network)
    with pytest.raises(FileNotFoundError, match="URLError"):
        CIFAR10DataModule(str(tmp_path / "new")).prepare_data()
    assert not (tmp_path / "new").exists()


def test_no_files_and_no_download(root):
    file(root, NAMES[5]).unlink()
    with pytest.raises(FileNotFoundError, match=r"test_batch.bin in `root`, .* without them; set `download`, or fetch"):
        make(root, download=False).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"test_batch.bin in `root`, .* call prepare_data\(\) first"):
        ready(root)


def test_an_archive_that_is_not_the_official_one(root, monkeypatch):
    publish(root, monkeypatch)
    (Path(root) / "cifar-10-binary.tar.gz").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"official cifar-10-binary.tar.gz in `root`, got another file; delete it"):
        make(root, download=False).prepare_data()


@pytest.mark.skipif(REAL is None, reason="set TENZOO_CIFAR10 to the folder of the official files to read them")
def test_the_real_files():
    data = CIFAR10DataModule(REAL, download=False)
    data.setup()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 45000, "val": 5000, "test": 10000}
    labels = torch.cat([data.splits["train"].label, data.splits["val"].label])
    assert labels.bincount().tolist() == [5000] * 10
    assert data.splits["test"].label.bincount().tolist() == [1000] * 10
    train = data.splits["train"].image.double() / 255
    assert train.mean((0, 2, 3)).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
    assert train.std((0, 2, 3)).tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-3)


def test_a_file_larger_than_the_official_one_is_not_read(root):
    with file(root, "data_batch_2.bin").open("r+b") as large:
        large.truncate(10**12)
    with pytest.raises(ValueError, match=r"official data_batch_2.bin of 30730000 bytes in `root`, got 10{12} bytes"):
        ready(root)
