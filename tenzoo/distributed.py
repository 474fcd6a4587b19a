"""What keeps several processes at one and the same model."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler


def gather(trainer: Trainer, tensor: Tensor) -> Tensor:
    """What each process has, stacked by rank; a collective, on the device of the strategy.

    Args:
        trainer: With several processes.
        tensor: Of one shape and dtype on all of them.

    Returns:
        Shape ``(world_size, …)``.
    """
    own = tensor.detach().to(trainer.strategy.root_device)
    every = [torch.empty_like(own) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(every, own)  # Lightning's own takes a function that torch deprecates
    return torch.stack(every)


def true_everywhere(fact: bool, device: torch.device) -> bool:
    """Whether something holds on all ranks; a collective."""
    flag = torch.tensor(int(fact), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)


def share_buffers_(trainer: Trainer) -> None:
    """Let DDP hand out the buffers of rank 0 under manual optimization as it does under automatic optimization.

    Before the first batch of each accumulation window, and before validation, all ranks take over the buffers of
    rank 0, such as the running statistics of normalization layers. DDP does so in the forward pass after one whose
    gradients it was going to average. Lightning switches that averaging off during any forward pass of manual
    optimization, and DDP would never hand out buffers again.
    """
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        model.register_forward_hook(_BuffersAreDue(trainer))


class _BuffersAreDue:
    """Tells DDP after a training step that the next forward pass begins with the buffers of rank 0."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            accumulates = self._trainer.fit_loop.epoch_loop._should_accumulate()
            model.require_forward_param_sync = not accumulates  # type: ignore[assignment]


def check_strategy(strategy: Strategy, user: str) -> None:
    """Refuse a strategy under which gradients and weights of single cores cannot be had.

    Args:
        strategy: Of the Trainer.
        user: What needs them, as it is called in the message.

    Raises:
        ValueError: Naming the strategy and what to take instead.

    Example:
        >>> from lightning.pytorch.strategies import DDPStrategy
        >>> check_strategy(DDPStrategy(), "`sam`")
    """
    reasons = {
        FSDPStrategy: "which flattens all parameters into one and shards that: norms would be those of a part",
        DeepSpeedStrategy: "which keeps and reduces the gradients in an engine of its own",
    }
    for kind, reason in reasons.items():
        if isinstance(strategy, kind):
            raise ValueError(
                f"expected a strategy with whole parameters in `strategy` beside {user}, got {kind.__name__}, {reason}"
                "; take 'ddp', or ModelParallelStrategy with fully_shard() in configure_model()"
            )


def check_two_passes(strategy: Strategy, *, sync_ascent: bool) -> None:
    """Refuse a strategy that cannot run SAM's two backward passes in one step.

    Args:
        strategy: Of the Trainer.
        sync_ascent: Whether the first of them is to be averaged over the ranks.

    Raises:
        ValueError: Naming the strategy or its setting and what to do.
    """
    check_strategy(strategy, "`sam`")
    if isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph"):
        raise ValueError("expected static_graph=False in the DDP strategy beside `sam`, got True: SAM runs two graphs")
    if isinstance(strategy, ModelParallelStrategy) and not sync_ascent:
        raise ValueError(
            "expected True in `sam.sync_ascent` under ModelParallelStrategy, got False: a sharded parameter has no "
            "gradient but that of all ranks"
        )


def shared_out(loader: object) -> DistributedSampler[Any] | None:
    """What shares out the items of a loader among the processes; None if each process sees all of them."""
    samplers = getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return next((each for each in samplers if isinstance(each, DistributedSampler)), None)


def own_items(loader: object) -> int | None:
    """How many items of a loader count as this rank's own: those that follow repeat items of other ranks.

    A ``DistributedSampler`` gives all ranks equally many items, and starts over where they run out. None where nothing
    is shared out, or nothing repeated.
    """
    sampler = shared_out(loader)
    if sampler is None or sampler.drop_last:
        return None
    return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
