"""The core groups that a callback works on."""

from lightning.pytorch import Callback, LightningModule

from tenzoo.cores import CoreGroup, find_core_groups


def groups_for(callback: Callback, module: LightningModule) -> list[CoreGroup]:
    """The core groups of a module, for a callback that means nothing without any.

    Raises:
        ValueError: If there are none.
    """
    groups = find_core_groups(module)
    if not groups:
        raise ValueError(
            f"expected a model with core groups for {type(callback).__name__}, found none in "
            f"{type(module).__name__}; train it without the callback, or register_core_groups() for its layers"
        )
    return groups
