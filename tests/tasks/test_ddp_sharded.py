"""Parameters sharded over two processes by FSDP2 train as whole ones in one process."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor, Rebalance
from tenzoo.layers import TensorizedLinear
from tenzoo.tasks import SAM, Task
from tenzoo.training import DivergenceError
from tests.processes import in_processes
from tests.tasks.toy import Batches, Shares, adam, sgd, trainer


class Sharded(Task):
    """Two layers of cores and a dense one; shards them where there are several processes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network = nn.Sequential(
            TensorizedLinear(6, 8, factorization="tt", rank=3),
            nn.Tanh(),
            TensorizedLinear(8, 5, factorization="tucker", rank=2),
            nn.Tanh(),
            nn.Linear(5, 3),
        ).double()

    def configure_model(self) -> None:
        if self.trainer.world_size > 1:
            for layer in self.network:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.network(x), y)


def batches() -> list[tuple[Tensor, ...]]:
    """Three batches in double precision."""
    return [tuple(part.double() for part in batch) for batch in Batches(count=3)]


METHODS: dict[str, tuple[dict[str, Any], list[Callback]]] = {
    "plain": ({}, []),
    "das": ({}, [DeviationAwareScaling(0.3)]),
    "das_global": ({}, [DeviationAwareScaling(0.3, normalizer="global", gauge_fixed=True)]),
    "rebalanced": ({}, [Rebalance()]),
    "sam": ({"sam": SAM(rho=0.3)}, []),
    "sam_cores": ({"sam": SAM(rho=0.3, scope="cores")}, []),
    "asam": ({"sam": SAM(rho=0.3, adaptive=True)}, []),
    "sam_accumulated": ({"sam": SAM(rho=0.3), "accumulate_grad_batches": 2}, []),
    "clipped": ({"gradient_clip_val": 0.01}, []),
}


def trained(method: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    torch.manual_seed(1)
    arguments, callbacks = METHODS[method]
    monitor = NormDynamicsMonitor()
    sharded = torch.distributed.is_torchelastic_launched()
    where: dict[str, Any] = {}
    if sharded:
        where = {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "devices": 2}
    task = Sharded(optimizer=sgd(), **arguments)
    fit = trainer(max_epochs=2, callbacks=[*callbacks, monitor], **where)
    fit.fit(task, Shares(batches(), fit.global_rank, fit.world_size))
    weights = {name: p.full_tensor() if sharded else p.detach() for name, p in task.named_parameters()}
    return {name: value.clone() for name, value in weights.items()}, monitor.state_dict()


def trained_all(methods: list[str]) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    return [trained(method) for method in methods]


def test_norms_are_those_of_the_whole_parameters():
    methods = list(METHODS)
    first, second = in_processes(trained_all, methods)
    for method, (weights, history), other in zip(methods, first, second, strict=True):
        expected, expected_history = trained(method)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-12, msg=f"{method}: {name}")
            assert other[0][name].equal(weights[name])
        assert history["history"] == other[1]["history"]
        for name, rows in expected_history["history"].items():
            assert [value for row in history["history"][name] for value in row] == pytest.approx(
                [value for row in rows for value in row], rel=1e-8
            )


class Resumable(Shares):
    """Four batches, which continue where they were."""

    def __init__(self, rank: int, count: int) -> None:
        super().__init__([*batches(), batches()[0]], rank, count)
        self._seen = 0

    def __iter__(self) -> Any:
        for batch in self._batches[self._seen :]:
            self._seen += 1
            yield batch
        self._seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = state["seen"]


class Saves(Callback):
    """Saves a checkpoint after the third batch, in the middle of a window."""

    def __init__(self, path: str) -> None:
        self._path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == 2:
            trainer.save_checkpoint(self._path)


def ended(*, seed: int, files: bool, save: str | None = None, resume: str | None = None) -> dict[str, Tensor]:
    """The weights after two epochs."""
    torch.manual_seed(seed)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=files)
    callbacks = [DeviationAwareScaling(0.3), *([] if save is None else [Saves(save)])]
    fit = trainer(max_epochs=2, callbacks=callbacks, strategy=strategy, devices=2)
    task = Sharded(optimizer=adam(), sam=SAM(rho=0.3), accumulate_grad_batches=2)
    fit.fit(task, Resumable(fit.global_rank, fit.world_size), ckpt_path=resume, weights_only=True)
    return {name: p.full_tensor() for name, p in task.named_parameters()}


def resumed(folder: str) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The weights of a run, and of one from a checkpoint of it; with one file, and with a file of each process."""
    results = []
    for files in (False, True):
        path = f"{folder}/{files}.ckpt"
        results.append((ended(seed=1, files=files, save=path), ended(seed=2, files=files, resume=path)))
    return results


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    for results in in_processes(resumed, str(tmp_path)):
        for whole, continued in results:
            for name, value in whole.items():
                assert continued[name].equal(value), name


class Ruined(Callback):
    """Makes one element infinite, which lies in the shard of the last rank."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.network[-1].weight.to_local()[-1, -1] = torch.inf


def diverged() -> str:
    where = {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "devices": 2}
    fit = trainer(max_epochs=2, callbacks=[Ruined()], **where)
    with pytest.raises(DivergenceError) as caught:
        fit.fit(Sharded(optimizer=sgd()), Shares(batches(), fit.global_rank, fit.world_size))
    return str(caught.value)


def test_all_ranks_stop_for_an_infinity_in_the_shard_of_one():
    first, second = in_processes(diverged)
    assert first.startswith("training diverged: a shard elsewhere is not finite after 3 steps")
    assert second.startswith("training diverged: 'network.4.weight' is not finite after 3 steps")
