"""What is not averaged by DDP itself is the same on all ranks."""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

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


class OwnSplits(Batches):
    """Batches of a rank's own, of as many items as it is told."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(count=3, size=size, seed=20 + rank)


class Followed(Callback):
    """Keeps the learning rates, and the monitored metric, of every epoch."""

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.rates: list[float] = []
        self.values: list[float] = []
        self.own: list[float] = []
        self.errors: list[tuple[float, int]] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        self.errors.append((float(pl_module.error(batch)), len(batch[0])))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.values.append(float(trainer.callback_metrics["val/loss"]))


def followed(monitor: str, sam: SAM | None, folder: str) -> dict[str, Any]:
    """Plateau scheduler, early stopping and checkpoints follow what no one reduced; batches differ in size."""
    torch.manual_seed(1)
    seen = Followed(monitor)
    stop = EarlyStopping("val/loss", patience=5)
    keep = ModelCheckpoint(folder, monitor="val/loss", save_top_k=2)
    task = Regression(
        optimizer=sgd(1.5),
        sam=sam,
        lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, factor=0.7, threshold=0.1),
        lr_scheduler_monitor=monitor,
    )
    settings: dict[str, Any] = {"strategy": "ddp", "devices": 2, "max_epochs": 12, "enable_checkpointing": True}
    fit = trainer(num_sanity_val_steps=0, callbacks=[seen, stop, keep], **settings)
    rank = fit.global_rank
    fit.fit(task, OwnSplits(rank, 8), OwnSplits(rank, 3 - rank))
    return {
        "rates": seen.rates,
        "values": seen.values,
        "errors": seen.errors,
        "stopped": stop.stopped_epoch,
        "best": float(keep.best_model_score),
        "path": keep.best_model_path,
        "weights": task.state_dict(),
    }


@pytest.mark.sampled(2)
@pytest.mark.parametrize("sam", [None, SAM(rho=0.05)], ids=["automatic", "manual"])
@pytest.mark.parametrize("monitor", ["val/loss", "train/mse"])
def test_what_is_followed_is_the_same_on_all_ranks(tmp_path, monitor, sam):
    first, second = in_processes(followed, monitor, sam, str(tmp_path))
    assert len(set(first["rates"])) > 2
    for key in ("rates", "values", "stopped", "best", "path"):
        assert first[key] == second[key], key
    for name, value in first["weights"].items():
        assert value.equal(second["weights"][name]), name
    # Every item counts once, though one rank has half as many again as the other.
    for epoch, value in enumerate(first["values"]):
        batches = [*first["errors"][3 * epoch : 3 * epoch + 3], *second["errors"][3 * epoch : 3 * epoch + 3]]
        expected = sum(error * size for error, size in batches) / sum(size for _, size in batches)
        assert value == pytest.approx(expected, rel=1e-5)


class Told(Regression):
    """Says itself what is reduced."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.error(batch))
        self.log("val/own", self.error(batch), sync_dist=False)
        self.log("val/first", self.error(batch), rank_zero_only=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.error(batch))
        self.log_dict({"test/items": float(len(batch[0]))})
        self.log("test/sum", float(len(batch[0])), reduce_fx="sum")


def judged(when: str) -> tuple[dict[str, float], list[tuple[float, int]]]:
    """What is logged of a share of the batches, where nothing follows it; and the error and size of each batch."""
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log\\('val/(own|first)'")
    torch.manual_seed(1)
    task = Told(optimizer=sgd(1e-9))
    fit = trainer(strategy="ddp", devices=2, max_epochs=1, num_sanity_val_steps=0)
    share = OwnSplits(fit.global_rank, 3 - fit.global_rank)
    fit.fit(task, Batches(1), share) if when == "fit" else getattr(fit, when)(task, share, verbose=False)
    logged = {name: float(value) for name, value in fit.callback_metrics.items()}
    return logged, [(task.error(batch).item(), len(batch[0])) for batch in share.batches]


@pytest.mark.parametrize("when", ["fit", "validate", "test"])
def test_what_is_judged_is_of_all_ranks(when):
    (first, own), (second, others) = in_processes(judged, when)
    split = "test" if when == "test" else "val"

    def mean(batches: list[tuple[float, int]]) -> float:
        return sum(error * size for error, size in batches) / sum(size for _, size in batches)

    assert mean(own) != pytest.approx(mean(others), rel=1e-2)
    for logged in (first, second):
        assert logged[f"{split}/loss"] == pytest.approx(mean([*own, *others]), rel=1e-5)
    if when == "test":
        assert first["test/items"] == second["test/items"] == pytest.approx((9 * 3 + 6 * 2) / 15)
        assert first["test/sum"] == second["test/sum"] == 15
    else:
        assert first["val/own"] == first["val/first"] == pytest.approx(mean(own), rel=1e-5)
        assert second["val/own"] == pytest.approx(mean(others), rel=1e-5)
