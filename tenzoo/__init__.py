"""tenzoo: a PyTorch Lightning model zoo of tensorized networks."""

__version__ = "0.2.0"

from tenzoo.cores import CoreContainer, CoreGroup, CoreProvider, find_core_groups, register_core_groups

__all__ = ["CoreContainer", "CoreGroup", "CoreProvider", "find_core_groups", "register_core_groups"]
