"""A check that all ranks train the same model."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from typing_extensions import override

from tenzoo.distributed import gather
from tenzoo.dynamics import is_distributed
from tenzoo.training import RanksPartedError


class RankWatch(Callback):
    """Stop a run whose ranks no longer hold the same weights.

    DDP gives all ranks the same gradients, and assumes that they make the same steps. If a rank does something by
    itself, such as a learning rate that follows a metric of its own, the models diverge without a message: from then on
    the gradients belong to no model, and checkpoints hold that of rank 0.

    Every ``every_n_steps`` optimizer steps, and when training ends, each rank adds up the bits of its parameters, and
    one all-reduce of two integers compares the sums. If they differ, all ranks raise in the same step. A single process
    is not checked, nor are shards, nor post-local SGD, whose ranks differ on purpose.

    Args:
        every_n_steps: Optimizer steps between two checks. A check reads all parameters once and waits for the device.

    Raises:
        ValueError: For a number of steps below 1.
        RanksPartedError: While training, on all ranks, with the name of the first parameter that differs.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[RankWatch()], logger=False, accelerator="cpu")
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if isinstance(every_n_steps, bool) or every_n_steps < 1:
            raise ValueError(f"expected an int >= 1 in `every_n_steps`, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._enabled = False
        self._last_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        alike = isinstance(strategy, DDPStrategy | ModelParallelStrategy)
        averages = getattr(strategy, "_model_averaging_period", None) is not None
        self._enabled = trainer.world_size > 1 and alike and not averages
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._enabled and trainer.global_step >= self._last_step + self.every_n_steps:
            self._check(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and trainer.global_step > self._last_step:
            self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        self._last_step = trainer.global_step
        parameters = {name: each for name, each in module.named_parameters() if not is_distributed(each)}
        if not parameters:
            return
        device = trainer.strategy.root_device
        with torch.no_grad():
            sums = torch.stack([_bits(parameter).to(device) for parameter in parameters.values()])
        total = (sums * torch.arange(1, 2 * len(sums), 2, device=device)).sum()
        extremes = torch.stack([total, -total])
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
        if int(extremes.sum()) != 0:
            every = gather(trainer, sums)
            differs = (every != every[0]).any(0).tolist()
            name = next(name for name, parted in zip(parameters, differs, strict=True) if parted)
            raise RanksPartedError(
                f"expected the same weights on all {trainer.world_size} ranks, got different ones in {name!r} after "
                f"{self._last_step} steps; see what one rank does by itself, such as following a metric that is not "
                "logged with sync_dist=True"
            )


def _bits(parameter: Tensor) -> Tensor:
    """The sum of a parameter's elements, read as integers: exact modulo 2⁶⁴, and so the same in any order."""
    real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return real.detach().view(integers[real.element_size()]).sum(dtype=torch.int64)
