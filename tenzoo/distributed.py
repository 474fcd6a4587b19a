"""Collectives, and checks that several processes train the same model."""

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
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from tenzoo.dynamics import is_distributed


def is_first_process() -> bool:
    """Whether this is the process of rank 0, or the only one; known before there is a process group.

    Example:
        >>> is_first_process()
        True
    """
    return getattr(rank_zero_only, "rank", 0) == 0


def gather(trainer: Trainer, tensor: Tensor) -> Tensor:
    """The tensors of all processes, stacked by rank; a collective, on the device of the strategy.

    Args:
        trainer: The Trainer of several processes.
        tensor: The tensor of this process. Shape and dtype are the same on all.

    Returns:
        Shape ``(world_size, …)``.
    """
    own = tensor.detach().to(trainer.strategy.root_device)
    every = [torch.empty_like(own) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(every, own)  # Lightning's own takes a function that torch deprecates
    return torch.stack(every)


def true_everywhere(fact: bool, device: torch.device) -> bool:
    """Whether ``fact`` is true on all ranks; a collective."""
    flag = torch.tensor(int(fact), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)


def share_buffers_(trainer: Trainer) -> None:
    """Let DDP broadcast the buffers of rank 0 under manual optimization as it does under automatic optimization.

    Before the first batch of each accumulation window, and before validation, all ranks take the buffers of rank 0,
    such as the running statistics of normalization layers. DDP does so in the forward pass after one with averaged
    gradients. Lightning switches this averaging off in every forward pass of manual optimization, so that DDP would
    never broadcast buffers again.
    """
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        model.register_forward_hook(_BroadcastNext(trainer))


class _BroadcastNext:
    """A hook after a training step: the next forward pass of DDP starts with a broadcast of buffers."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            accumulates = self._trainer.fit_loop.epoch_loop._should_accumulate()
            model.require_forward_param_sync = not accumulates  # type: ignore[assignment]


def check_strategy(strategy: Strategy, user: str) -> None:
    """Refuse a strategy that does not give access to gradients and weights of single cores.

    Args:
        strategy: The strategy of the Trainer.
        user: The name, for the message, of the part that needs them.

    Raises:
        ValueError: With the strategy, and what to take instead.

    Example:
        >>> from lightning.pytorch.strategies import DDPStrategy
        >>> check_strategy(DDPStrategy(), "`sam`")
    """
    reasons = {
        FSDPStrategy: "which flattens all parameters into one and shards it: norms would be those of a part",
        DeepSpeedStrategy: "which holds the gradients in its own engine",
    }
    for kind, reason in reasons.items():
        if isinstance(strategy, kind):
            raise ValueError(
                f"expected a strategy with whole parameters in `strategy` with {user}, got {kind.__name__}, {reason}"
                "; take 'ddp', or ModelParallelStrategy with fully_shard() in configure_model(), for adapters with "
                "tenzoo.adapters.shard_frozen_()"
            )


def check_two_passes(strategy: Strategy, *, sync_ascent: bool) -> None:
    """Refuse a strategy that cannot run SAM's two backward passes in one step.

    Args:
        strategy: The strategy of the Trainer.
        sync_ascent: Whether the first pass is averaged over the ranks.

    Raises:
        ValueError: With the strategy or its setting, and what to do.
    """
    check_strategy(strategy, "`sam`")
    if isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph"):
        raise ValueError("expected static_graph=False in the DDP strategy with `sam`, got True: SAM runs two graphs")
    if isinstance(strategy, ModelParallelStrategy) and not sync_ascent:
        raise ValueError(
            "expected True in `sam.sync_ascent` under ModelParallelStrategy, got False: gradients are always those of "
            "all ranks there"
        )


def check_reduced(strategy: Strategy, module: nn.Module) -> None:
    """Refuse a trained parameter whose gradient nothing reduces over processes: it would differ on each of them.

    ``ModelParallelStrategy`` leaves this to the user. FSDP2 reduces gradients of shards, and a hook those of whole
    parameters.

    Args:
        strategy: The strategy of the Trainer, in training.
        module: The module that is trained.

    Raises:
        ValueError: With the name of such a parameter, and what to do.
    """
    if not isinstance(strategy, ModelParallelStrategy) or strategy.device_mesh["data_parallel"].size() == 1:
        return
    for name, parameter in module.named_parameters():
        hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
        if parameter.requires_grad and not is_distributed(parameter) and not hooks:
            raise ValueError(
                "expected every trained parameter in fully_shard() or tenzoo.adapters.shard_frozen_() in "
                f"configure_model(), got {name!r} in neither, which each process would train alone"
            )


def shared_out(loader: object) -> DistributedSampler[Any] | None:
    """The sampler that divides the items of a loader among the processes; None if each process sees all items."""
    samplers = getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return next((each for each in samplers if isinstance(each, DistributedSampler)), None)


def own_items(loader: object) -> int | None:
    """The number of items of a loader that no other rank has. The items after them repeat those of other ranks.

    A ``DistributedSampler`` gives all ranks the same number of items, and repeats some if there are too few. None if
    items are not divided among processes, or none are repeated.
    """
    sampler = shared_out(loader)
    if sampler is None or sampler.drop_last:
        return None
    return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
