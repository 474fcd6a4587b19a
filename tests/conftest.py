import pytest

from tests.data.small_cifar10 import write_small


@pytest.fixture
def root(tmp_path, monkeypatch) -> str:
    """The folder of a small CIFAR-10 that passes for the official one."""
    write_small(tmp_path / "cifar10", monkeypatch)
    return str(tmp_path / "cifar10")
