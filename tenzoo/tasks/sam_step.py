"""A step of Sharpness-Aware Minimization: two passes over a batch, and one step of the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer import call
from torch import Tensor

from tenzoo.cores import find_core_groups
from tenzoo.dynamics import SharpnessState, SharpnessWindow, sharpness_perturbation
from tenzoo.tasks.sam import SAM, ForwardState, without_sync
from tenzoo.training import batches_in_window, is_last_batch, loss_scale, steps_after_this_batch

if TYPE_CHECKING:
    from tenzoo.tasks.base import Task


def sam_step(task: Task, sam: SAM, batch: Any, batch_idx: int) -> Tensor:
    """Train on one batch in manual mode.

    Args:
        task: The task.
        sam: The settings of SAM.
        batch: The batch.
        batch_idx: Number of the batch in the epoch.

    Returns:
        The loss at the unperturbed weights.
    """
    optimizer = task.optimizers()
    assert not isinstance(optimizer, list)
    if batches_in_window(task.trainer) == 1:
        call._call_callback_hooks(task.trainer, "on_before_zero_grad", optimizer)
        call._call_lightning_module_hook(task.trainer, "on_before_zero_grad", optimizer)
        optimizer.zero_grad()
        task._ascents = SharpnessWindow()
    steps = steps_after_this_batch(task.trainer)
    loss = _backward(task, sam, batch, batch_idx, sync=steps)
    if steps:
        task._complete_window()
        optimizer.step()
        task._step_schedulers("step", plateau=False)
    if is_last_batch(task.trainer):
        task._step_schedulers("epoch", plateau=False)
    return loss


def _backward(task: Task, sam: SAM, batch: Any, batch_idx: int, *, sync: bool) -> Tensor:
    """Add the gradient at the perturbed weights to ``.grad``; see :func:`sharpness_perturbation`."""
    strategy = task.trainer.strategy
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    # Copies: under DDP a gradient can be a view of memory that the reduction of the ascent overwrites.
    accumulated = [parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    state = ForwardState(task, task.device, task._kinds)
    task._perturbed_was_read = False
    first = _pass(task, batch, batch_idx)
    state.note(keep=task._perturbed_was_read)
    task._note_loss(first, batch)
    with without_sync(strategy, not sam.sync_ascent), _without_hooks(task):
        task.manual_backward(first)
    scope = None if sam.scope == "all" else [core for group in find_core_groups(task) for core in group.cores]
    with sharpness_perturbation(parameters, rho=sam.rho, adaptive=sam.adaptive, perturbed=scope) as known:
        one = task.trainer.accumulate_grad_batches == 1
        task.sharpness_state = _unscaled(task, known if one else task._ascents.add(known))
        for parameter, grad in zip(parameters, accumulated, strict=True):
            parameter.grad = grad
        task._perturbed = True  # before `rewind`, which remembers attributes
        try:
            state.rewind()
            try:
                second = _pass(task, batch, batch_idx) / task.trainer.accumulate_grad_batches
            finally:
                state.restore()
            with without_sync(strategy, not sync):
                task.manual_backward(second)
        finally:
            task._perturbed = False
            state.finish()
    return first.detach()


@contextmanager
def _without_hooks(task: Task) -> Iterator[None]:
    """Call no hooks for a backward pass. They are called for the pass whose gradient the optimizer takes."""
    callbacks, hooks = task.trainer.callbacks, ("on_before_backward", "on_after_backward")  # type: ignore[attr-defined]
    own = vars(task)
    kept = {hook: own[hook] for hook in hooks if hook in own}
    task.trainer.callbacks = []  # type: ignore[attr-defined]
    own.update(dict.fromkeys(hooks, lambda *_: None))
    try:
        yield
    finally:
        task.trainer.callbacks = callbacks  # type: ignore[attr-defined]
        for hook in hooks:
            del own[hook]
        own.update(kept)


def _pass(task: Task, batch: Any, batch_idx: int) -> Tensor:
    """The loss of a batch, in the precision of the trainer."""
    with task.trainer.precision_plugin.forward_context():
        loss = task.loss(batch, batch_idx)
    torch.clear_autocast_cache()  # which holds casts of weights that are about to move
    return loss


def _unscaled(task: Task, state: SharpnessState) -> SharpnessState:
    scale = loss_scale(task.trainer)
    if scale is None:
        return state
    scale = scale.to(state.squared_grad_norms)
    return dataclasses.replace(
        state,
        squared_grad_norms=state.squared_grad_norms / scale.square(),
        steering=None if state.steering is None else state.steering / scale,
    )
