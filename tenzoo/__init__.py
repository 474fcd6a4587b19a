"""tenzoo: a PyTorch Lightning model zoo of tensorized networks."""

__version__ = "0.1.0"

from tenzoo.cores import CoreGroup, CoreProvider, find_core_groups, register_core_groups

__all__ = ["CoreGroup", "CoreProvider", "find_core_groups", "register_core_groups"]
