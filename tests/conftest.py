import pytest

from tests.data.small_cifar10 import write_small


@pytest.fixture
def root(tmp_path, monkeypatch) -> str:
    """The folder of a small CIFAR-10 that passes for the official one."""
    write_small(tmp_path / "cifar10", monkeypatch)
    return str(tmp_path / "cifar10")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow all cases of a test marked ``sampled(n)`` but n of them, which are spread evenly."""
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled") is not None:
            families.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for family in families.values():
        (number,) = family[0].get_closest_marker("sampled").args  # type: ignore[union-attr]
        kept = {position * len(family) // number for position in range(min(number, len(family)))}
        for position, item in enumerate(family):
            if position not in kept:
                item.add_marker(pytest.mark.slow)
