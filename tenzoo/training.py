"""Questions of tasks and callbacks to a running Trainer."""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from tenzoo.data.resumable import ResumableDataModule
from tenzoo.distributed import gather, true_everywhere
from tenzoo.dynamics import by_device_and_dtype, is_distributed, own_part


def scales_loss(trainer: Trainer) -> bool:
    """Whether the loss is scaled before the backward pass, as in float16 training."""
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None


def loss_scale(trainer: Trainer) -> Tensor | None:
    """The scale of the loss in this step, a scalar on the device; None without one. It does not wait for the device."""
    plugin = trainer.precision_plugin
    return plugin.scaler._get_scale_async() if isinstance(plugin, MixedPrecision) and plugin.scaler else None


def unscales_its_gradients(optimizer: Optimizer) -> bool:
    """Whether the optimizer's ``step`` divides the gradients by the scale of the loss, as fused optimizers do.

    Lightning does not unscale the gradients of such an optimizer before the step.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def gradient_scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """The scale of the gradients just before the step, a scalar on the device; None if they are unscaled."""
    return loss_scale(trainer) if unscales_its_gradients(optimizer) else None


def after_clipping(trainer: Trainer, function: Callable[[], None]) -> None:
    """Call a function once, after the gradients of the coming step are clipped.

    Lightning has no hook there: first callbacks run, then the module's own hook, then it clips.
    """
    plugin = trainer.precision_plugin
    clip = plugin._clip_gradients

    def clip_and_call(*args: Any, **kwargs: Any) -> None:
        forget_clipping(trainer)
        clip(*args, **kwargs)
        function()

    plugin._clip_gradients = clip_and_call  # type: ignore[method-assign]


def forget_clipping(trainer: Trainer) -> None:
    """Cancel :func:`after_clipping`, if the function was not called yet."""
    vars(trainer.precision_plugin).pop("_clip_gradients", None)


def settings_of(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """The parameter group of each parameter, by the parameter's ``id``."""
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}


def steps_so_far(trainer: Trainer) -> int:
    """Number of training steps before the current one. Steps of several optimizers after one batch count once."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def logs_this_step(trainer: Trainer) -> bool:
    """Whether the current training step is logged, as every ``log_every_n_steps``-th is.

    Ask before computing a value only for the loggers.
    """
    # The same as Lightning's own check in training, without its search for the active loop.
    every, fast_dev_run = trainer.log_every_n_steps, trainer.fast_dev_run  # type: ignore[attr-defined]
    return bool(fast_dev_run) or (every > 0 and (steps_so_far(trainer) + 1) % every == 0)


def batches_in_window(trainer: Trainer) -> int:
    """Number of batches since the last step of the optimizer, with the current one."""
    ready = int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
    return (ready - 1) % trainer.accumulate_grad_batches + 1


def steps_after_this_batch(trainer: Trainer) -> bool:
    """Whether the optimizer steps after the current batch, the last of its accumulation window or of the epoch."""
    return not trainer.fit_loop._should_accumulate()


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the current training batch is the last one of its epoch."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def mean_over_ranks(trainer: Trainer, value: Tensor) -> Tensor:
    """The mean over the processes; a collective if there are several."""
    if trainer.world_size == 1:
        return value
    reduced: Tensor = trainer.strategy.reduce(value, reduce_op="mean")
    return reduced


class EpochMean:
    """The mean over an epoch and over the processes, computed on the device.

    Its state holds the sum and the count of every process, so that an interrupted epoch continues exactly.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0.0

    def add(self, total: Tensor, count: float) -> None:
        """Add the sum of some values, a scalar without gradient, and their number."""
        total = total if total.device.type == "mps" else total.double()  # no float64 on this device
        self._sum = total.clone() if self._sum is None else self._sum.to(total) + total
        self._count += count

    def reset(self) -> None:
        """Set sum and count to 0."""
        self._sum, self._count = None, 0.0

    def compute(self, trainer: Trainer) -> Tensor | None:
        """The mean, in float32; None without a value. A collective if there are several processes."""
        total = self._over_ranks(trainer)
        return None if total is None else (total[:, 0].sum() / total[:, 1].sum()).float()

    def state(self, trainer: Trainer) -> Tensor | None:
        """Sum and count of every process, shape ``(world_size, 2)``; None without a value.

        A collective if there are several processes, except during an exception: the others may not save then.
        """
        total = self._over_ranks(trainer, alone=sys.exc_info()[0] is not None)
        return None if total is None else total.cpu()

    def load(self, state: Tensor | None, trainer: Trainer) -> None:
        """Continue from a state. With another number of processes the first one takes the whole sum."""
        self.reset()
        if state is None:
            return
        if len(state) != trainer.world_size:
            state = torch.cat([state.sum(0, keepdim=True), state.new_zeros(trainer.world_size - 1, 2)])
        own = state[trainer.global_rank]
        self._sum, self._count = own[0].clone(), float(own[1])

    def _over_ranks(self, trainer: Trainer, *, alone: bool = False) -> Tensor | None:
        if self._sum is None:
            return None  # on all ranks: each has the same number of batches
        own = torch.stack([self._sum, torch.full_like(self._sum, self._count)])
        if alone or trainer.world_size == 1:
            return own[None]
        return gather(trainer, own)


_NEVER = 2**62


class LossWatch:
    """From which step on the losses are not finite, noted on the device: no step waits to know."""

    def __init__(self) -> None:
        self._since: Tensor | None = None

    def add(self, loss: Tensor, step: int) -> None:
        """Note the loss of a step, a scalar without gradient. A finite one forgets those before it."""
        since = torch.full((), _NEVER, device=loss.device) if self._since is None else self._since.to(loss.device)
        self._since = since.clamp(max=step).masked_fill(loss.isfinite(), _NEVER)

    def reset(self) -> None:
        """Forget all."""
        self._since = None

    def since(self) -> int | None:
        """The first of the last steps, all of whose losses are not finite; None if the last one is. It waits."""
        step = _NEVER if self._since is None else int(self._since)
        return None if step == _NEVER else step


class DivergenceError(ArithmeticError):
    """A weight or the loss is not finite, or the ranks of a run have different weights."""


class RanksPartedError(DivergenceError):
    """The ranks of a run no longer have the same weights."""


def check_finite(module: nn.Module, *, when: str, losses: LossWatch | None = None) -> None:
    """Refuse weights that are not finite. It waits for the device.

    Args:
        module: The module with the parameters.
        when: The time of the check, for the message.
        losses: Those of the steps so far, for the message.

    Raises:
        DivergenceError: With the name of a parameter.

    Example:
        >>> check_finite(nn.Linear(2, 2), when="at step 3")
    """
    parts = {name: own_part(parameter.detach()) for name, parameter in module.named_parameters()}
    values = [torch.view_as_real(part) if part.is_complex() else part for part in parts.values()]
    values = [each for each in values if each.is_floating_point() and each.numel() and not each.is_meta]
    with torch.no_grad():
        # The largest entry does not overflow, as a norm may.
        largest = [torch.stack(torch._foreach_norm(group, ord=math.inf)) for (group,) in by_device_and_dtype(values)]
        finite = [each.isfinite().all() for each in largest]
    fine = all(map(bool, finite))
    if any(map(is_distributed, module.parameters())) and sys.exc_info()[0] is None:
        fine = true_everywhere(fine, next(iter(parts.values())).device)  # a process sees only its own shards
    if fine:
        return
    name = next((repr(name) for name, part in parts.items() if not bool(part.isfinite().all())), "a shard elsewhere")
    since = None if losses is None else losses.since()
    loss = "" if since is None else f"the loss is not finite from step {since} on, "
    gradient = next((repr(name) for name, each in module.named_parameters() if not _has_finite_gradient(each)), None)
    told = "" if gradient is None else f"the gradient of {gradient} is not finite, "
    raise DivergenceError(f"training diverged: {loss}{told}{name} is not finite {when}; {_REMEDY}")


_CLIP = "`gradient_clip_val` (in YAML model.init_args.gradient_clip_val)"
_REMEDY = f"lower the learning rate, or bound the gradient with {_CLIP}"


def _has_finite_gradient(parameter: nn.Parameter) -> bool:
    if parameter.grad is None or parameter.grad.is_meta:
        return True
    grad = own_part(parameter.grad)
    return bool((grad.coalesce().values() if grad.is_sparse else grad).isfinite().all())


def check_last_loss(trainer: Trainer, losses: LossWatch) -> None:
    """Refuse to end with a loss that is not finite: no step is made with it in float16, and the weights stay finite.

    A collective if there are several processes.

    Args:
        trainer: The Trainer, at the end of training.
        losses: Those of the steps so far.

    Raises:
        DivergenceError: With the step from which on it is not.
    """
    since = losses.since()
    if trainer.world_size > 1 and not true_everywhere(since is None, trainer.strategy.root_device):
        every = gather(trainer, torch.tensor(_NEVER if since is None else since, device=trainer.strategy.root_device))
        since = int(every.min())
    if since is not None:
        raise DivergenceError(
            f"training diverged: the loss is not finite from step {since} on, though the weights are; look for such "
            f"values in the data, or {_REMEDY}"
        )


def log_to_loggers(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Give values to all loggers, at the current training step.

    It takes a fiftieth of the time of ``LightningModule.log``, which also prepares for reduction over epochs and ranks:
    longer than a step of a small model.
    """
    step = steps_so_far(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step)


def batch_weight(module: LightningModule) -> float:
    """The factor for a mean over this process's share of the training batch: 1, unless shares are uneven.

    With it, DDP's average of gradients over processes is the gradient of the mean over the whole batch. It comes from a
    data module that divides batches among processes.
    """
    data = getattr(module._trainer, "datamodule", None)
    return data.batch_weight if isinstance(data, ResumableDataModule) else 1.0


def batch_items(module: LightningModule, batch: Any) -> float:
    """The number of items in a training batch, on average over the processes.

    It is the first size of the first tensor that has a dimension, or 1.
    """
    data = getattr(module._trainer, "datamodule", None)
    if isinstance(data, ResumableDataModule) and data.batch_items is not None:
        return data.batch_items
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


class NoProfiler(PassThroughProfiler):
    """Lightning's "no profiler", without the generator that it creates sixty times a step."""

    _nothing = nullcontext()

    @override
    def profile(self, action_name: str) -> nullcontext[None]:  # type: ignore[override]
        return self._nothing


def steps_of_run(trainer: Trainer, argument: str) -> float:
    """The steps of all optimizers in a run, as Lightning estimates them: -1 or infinity if unknown.

    Args:
        trainer: The Trainer, before training.
        argument: The argument that needs them, for the message.

    Raises:
        ValueError: With a callback that changes the batches per step, which the estimate does not consider.
    """
    if any(isinstance(each, GradientAccumulationScheduler) for each in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            f"expected no GradientAccumulationScheduler with {argument}, which needs the number of steps, got one; set "
            "`accumulate_grad_batches` of the task"
        )
    return trainer.estimated_stepping_batches
