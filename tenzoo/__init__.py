"""tenzoo: a PyTorch Lightning model zoo of tensorized networks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tenzoo.cores import CoreContainer, CoreGroup, CoreProvider, find_core_groups, register_core_groups

__version__ = "0.2.0"
__all__ = ["CoreContainer", "CoreGroup", "CoreProvider", "find_core_groups", "register_core_groups"]


def __getattr__(name: str) -> Any:
    """The names of :mod:`tenzoo.cores`, when they are asked for: ``tenzoo --help`` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tenzoo import cores

    return getattr(cores, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
