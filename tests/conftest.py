import pytest

from tests.data.small_cifar10 import write_cifar10


@pytest.fixture
def root(tmp_path, monkeypatch) -> str:
    """The folder of a small CIFAR-10 that passes for the official one."""
    digests = write_cifar10(tmp_path / "cifar10" / "cifar-10-batches-bin")
    monkeypatch.setattr("tenzoo.data.images.cifar10_files.SHA1", digests)
    return str(tmp_path / "cifar10")
