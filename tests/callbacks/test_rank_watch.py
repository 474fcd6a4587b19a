from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from tenzoo.callbacks import RankWatch
from tenzoo.training import RanksPartedError
from tests.processes import in_processes
from tests.tasks.toy import Batches, Regression, fitted, sgd, trainer


class OwnRate(Callback):
    """Gives rank 1 another learning rate in the tenth step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 9:
            trainer.optimizers[0].param_groups[0]["lr"] *= 1.01


class OneBit(Callback):
    """Moves one element of rank 1 by as little as there is, after the last batch."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 20:
            element = pl_module.inner.bias.data[3]
            element.copy_(element.nextafter(torch.tensor(torch.inf)))


def parted(disturbance: Callback, every_n_steps: int, **task: Any) -> tuple[str, int]:
    torch.manual_seed(1)
    fit = trainer(strategy="ddp", devices=2, callbacks=[disturbance, RankWatch(every_n_steps)], limit_val_batches=0)
    with pytest.raises(RanksPartedError) as caught:
        fit.fit(Regression(optimizer=sgd(), **task), Batches(), Batches())
    return str(caught.value), fit.global_step


@pytest.mark.parametrize(
    ("disturbance", "every", "name", "step"),
    [(OwnRate(), 4, "inner.weight", 12), (OwnRate(), 100, "inner.weight", 20), (OneBit(), 100, "inner.bias", 20)],
)
def test_all_ranks_stop_in_one_step(disturbance, every, name, step):
    for message, stopped in in_processes(parted, disturbance, every):
        assert message.startswith(
            f"expected the same weights on all 2 ranks, got different ones in {name!r} after {step} steps"
        )
        assert "\n" not in message
        assert stopped == step


def collectives(every_n_steps: int, accumulate: int) -> int:
    """How many all-reduces of two integers there are in 20 batches."""
    found = []
    real = torch.distributed.all_reduce

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        found.append((tensor.dtype, len(tensor.shape) and len(tensor)))
        return real(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    fitted(
        callbacks=[RankWatch(every_n_steps)],
        fit={"strategy": "ddp", "devices": 2, "limit_val_batches": 0},
        accumulate_grad_batches=accumulate,
    )
    return found.count((torch.int64, 2))


@pytest.mark.parametrize(("every", "accumulate", "looks"), [(5, 1, 4), (100, 1, 1), (4, 2, 3)])
def test_a_look_is_one_all_reduce_every_n_steps_and_one_in_the_end(every, accumulate, looks):
    assert in_processes(collectives, every, accumulate) == [looks, looks]


def test_one_process_is_not_watched(monkeypatch):
    monkeypatch.setattr(RankWatch, "_check", lambda *args: pytest.fail("there is nothing to compare with"))
    fitted(callbacks=[RankWatch(1)])


@pytest.mark.parametrize("count", [0, -1, True])
def test_a_number_of_steps_is_asked_for(count):
    with pytest.raises(ValueError, match="expected an int >= 1 in `every_n_steps`, got"):
        RankWatch(count)


def test_the_bits_of_every_type_are_summed():
    from tenzoo.callbacks.rank_watch import _bits

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn):
        tensor = torch.full((4, 3), 1.5).to(dtype)
        real = torch.view_as_real(tensor) if dtype.is_complex else tensor
        size = real.element_size()
        raw = real.numpy(force=True).tobytes() if dtype not in (torch.bfloat16, torch.float8_e4m3fn) else None
        expected = (
            sum(int.from_bytes(raw[i : i + size], "little", signed=True) for i in range(0, len(raw), size))
            if raw is not None
            else {torch.bfloat16: 12 * 0x3FC0, torch.float8_e4m3fn: 12 * 0x3C}[dtype]
        )
        assert (int(_bits(tensor)) - expected) % 2**64 == 0
        assert _bits(tensor.t()).equal(_bits(tensor))


class SeenError(Exception):
    pass


@pytest.mark.parametrize("kind", ["all_reduce"])
def test_what_is_reduced_lies_on_the_device_of_the_strategy(monkeypatch, kind):
    def record(tensor: Any, *args: Any, **kwargs: Any) -> None:
        assert tensor.device.type == "meta"
        assert not tensor.is_sparse
        raise SeenError

    monkeypatch.setattr(torch.distributed, kind, record)
    stub = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")), world_size=2, global_step=7)
    with pytest.raises(SeenError):
        RankWatch()._check(stub, nn.Linear(2, 3))  # type: ignore[arg-type]


def test_ranks_that_part_on_purpose_are_let_go():
    watch = RankWatch(1)
    stub = SimpleNamespace(strategy=DDPStrategy(model_averaging_period=4), world_size=2, global_step=0)
    watch.on_train_start(stub, nn.Linear(1, 1))  # type: ignore[arg-type]
    assert not watch._enabled
