"""Balancing of the core norms at the start of training."""

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from tenzoo.callbacks.groups import CoreCallback, groups_for
from tenzoo.dynamics import rebalance_


class Rebalance(CoreCallback):
    """Give the cores of each group equal norms once, at the start of training, without a change of their tensor.

    It is the control for SAM and DAS: it does at once what they do to the norms over many steps. Frozen cores do not
    change, and the others are balanced among each other. A resumed run is not balanced again.

    Raises:
        ValueError: From ``fit``, before training, for a model without core groups or with a core that is zero.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[Rebalance()], logger=False, accelerator="cpu")
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > 0:
            return
        for group in groups_for(self, pl_module):
            cores = [core for core in group.cores if core.requires_grad]
            if len(cores) > 1:
                rebalance_(cores)
