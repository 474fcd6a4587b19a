from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor, Rebalance
from tenzoo.compression import plan
from tenzoo.distributed import check_two_passes, gather, true_everywhere
from tenzoo.dynamics import squared_norms
from tenzoo.factorizations import TensorTrain
from tenzoo.tasks import SAM
from tenzoo.tasks.checks import check_clipping
from tenzoo.training import check_finite
from tests.processes import in_processes
from tests.tasks.toy import Regression


def made(kind: type[Any]) -> Any:
    """A strategy that this machine could not start."""
    return kind.__new__(kind)


def set_up(user: Any, trainer: Any) -> None:
    if isinstance(user, Regression):
        user._trainer = trainer
        user.setup("fit")
    else:
        user.setup(trainer, Regression(), "fit")


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
@pytest.mark.parametrize(
    "user", [DeviationAwareScaling(0.1), NormDynamicsMonitor(), Rebalance(), Regression(sam=SAM(rho=0.1))]
)
def test_strategies_without_whole_parameters_are_refused(kind, user):
    trainer = SimpleNamespace(strategy=made(kind), accumulate_grad_batches=1)
    name = "`sam`" if isinstance(user, Regression) else type(user).__name__
    with pytest.raises(ValueError, match=rf"in `strategy` with {name}, got {kind.__name__}, .*; take 'ddp'") as caught:
        set_up(user, trainer)
    assert "\n" not in str(caught.value)


def test_what_cannot_run_two_passes_is_refused():
    with pytest.raises(ValueError, match="expected static_graph=False in the DDP strategy with `sam`, got True"):
        check_two_passes(DDPStrategy(static_graph=True), sync_ascent=True)
    with pytest.raises(ValueError, match=r"expected True in `sam.sync_ascent` under ModelParallelStrategy, got False"):
        check_two_passes(ModelParallelStrategy(), sync_ascent=False)
    for strategy in (DDPStrategy(static_graph=False), DDPStrategy(find_unused_parameters=True)):
        check_two_passes(strategy, sync_ascent=False)
    check_two_passes(ModelParallelStrategy(), sync_ascent=True)


class SeenError(Exception):
    pass


@pytest.mark.parametrize("call", ["gather", "true_everywhere"])
def test_collectives_get_tensors_on_the_device_of_the_strategy(monkeypatch, call):
    def record(first: Any, second: Any = None, *args: Any) -> None:
        for tensor in [first] if isinstance(first, torch.Tensor) else [*first, second]:
            assert tensor.device.type == "meta"
        raise SeenError

    monkeypatch.setattr(torch.distributed, "all_gather", record)
    monkeypatch.setattr(torch.distributed, "all_reduce", record)
    meta = torch.device("meta")
    stub: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=meta), world_size=3)
    with pytest.raises(SeenError):
        gather(stub, torch.ones(2)) if call == "gather" else true_everywhere(True, meta)


def norms_of_shards() -> list[list[float]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor as Distributed
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2))
    rank = torch.distributed.get_rank()
    whole = [torch.arange(1.0, 13).view(4, 3), torch.arange(5.0), torch.ones(7, 2), torch.tensor([[3.0]])]
    placed = [
        distribute_tensor(whole[0], mesh, [Shard(0), Shard(1)]),
        distribute_tensor(whole[1], mesh, [Replicate(), Shard(0)]),
        distribute_tensor(whole[2], mesh, [Replicate(), Replicate()]),
        Distributed.from_local(torch.tensor([[float(rank)]]), mesh, [Partial(), Partial()]),  # 0 + 1 + 2 + 3
        torch.full((2,), 2.0),
    ]
    expected = [float((part * part).sum()) for part in whole[:3]] + [36.0, 8.0]
    return [squared_norms(placed).tolist(), expected]


def test_norms_of_tensors_that_are_shared_in_every_way():
    for found, expected in in_processes(norms_of_shards, count=4):
        assert found == pytest.approx(expected, rel=1e-6)


def answers_to_shards() -> list[str]:
    """What is said of a sharded weight, and of gradients of which some are sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    model = nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 8, bias=False))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    check_finite(model[0], when="now")  # the one row is in the first process, and the other has nothing
    adam = torch.optim.Adam(model.parameters())
    trainer: Any = SimpleNamespace(optimizers=[adam], precision_plugin=None)
    answers = []
    for kind, call in (
        (TypeError, lambda: TensorTrain.decompose(model[0].weight, 1)),
        (ValueError, lambda: plan(model, factorization="tt", ranks=1)),
        (ValueError, lambda: check_clipping(trainer)),
    ):
        with pytest.raises(kind, match="expected") as caught:
            call()
        answers.append(str(caught.value))
    return answers


def test_what_needs_whole_tensors_says_so_in_one_line():
    for found in in_processes(answers_to_shards):
        assert found == [
            "expected a whole tensor in `tensor`, got one that is sharded; take its full_tensor()",
            "expected whole parameters in `model`, got '0.weight', which is sharded; compress the model in one process",
            "expected parameters that are all sharded, or all whole, with `gradient_clip_val`, got both in one Adam; "
            "shard all of them, or only what is frozen",
        ]
