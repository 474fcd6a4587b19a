"""What is not averaged by DDP itself is the same on all ranks."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from tenzoo.tasks import SAM
from tests.processes import in_processes
from tests.tasks.toy import Batches, Regression, sgd, trainer


class Synchronized(Regression):
    """Logs the mean of all ranks in validation."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.error(batch), sync_dist=True)


class Judged(Callback):
    """Keeps the state that each validation judges, and its result."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.losses: list[Tensor] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.losses.append(trainer.callback_metrics["val/loss"])


def judge(
    path: str, accumulate: int, sam: SAM | None
) -> tuple[list[dict[str, Tensor]], list[Tensor], dict[str, Tensor]]:
    """Two epochs on batches of the rank's own; what was judged, and what was saved."""
    torch.manual_seed(1)
    judged = Judged()
    task = Synchronized(norm=True, optimizer=sgd(), sam=sam, accumulate_grad_batches=accumulate)
    fit = trainer(strategy="ddp", devices=2, max_epochs=2, num_sanity_val_steps=0, callbacks=[judged])
    fit.fit(task, Batches(count=3, seed=fit.global_rank), Batches(1, seed=9))
    fit.save_checkpoint(path)
    return judged.states, judged.losses, torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_buffers_are_those_of_rank_0_as_in_automatic_mode(tmp_path, accumulate):
    (plain, plain_losses, _), _ = in_processes(judge, str(tmp_path / "plain.ckpt"), accumulate, None)
    first, second = in_processes(judge, str(tmp_path / "sam.ckpt"), accumulate, SAM(rho=0.0))
    states, _, saved = first
    for rank in (first, second):
        assert len(rank[0]) == 2
        for state, expected in zip(rank[0], plain, strict=True):
            for name, value in state.items():
                assert value.equal(expected[name]), name
        assert rank[1] == plain_losses
    for name, value in states[-1].items():
        assert value.equal(saved[name]), name
