"""The core groups that a callback works on."""

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from tenzoo.cores import CoreGroup, find_core_groups
from tenzoo.distributed import check_strategy


class CoreCallback(Callback):
    """A callback that reads or scales single cores. Refuses strategies that do not have them."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_strategy(trainer.strategy, type(self).__name__)


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
