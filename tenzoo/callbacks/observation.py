"""What the norm monitor observes just before a step of an optimizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from tenzoo.callbacks.groups import PredictsDeviationRate, check_owners, trained_cores
from tenzoo.callbacks.norm_step import NormStep, squared_grad_norms
from tenzoo.cores import CoreGroup
from tenzoo.dynamics import SharpnessState, sam_deviation_rate, squared_norms
from tenzoo.training import settings_of

_RATE_SETTINGS = ("lr", "momentum", "weight_decay")
"""The settings of an optimizer on which the rates depend."""


def rate_predictors(trainer: Trainer) -> list[PredictsDeviationRate]:
    """The callbacks of a Trainer that predict how fast they move the Norm Deviation."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, PredictsDeviationRate)]


@torch.no_grad()
def observe_step(
    groups: Sequence[CoreGroup],
    trainer: Trainer,
    module: LightningModule,
    optimizer: Optimizer,
    *,
    scale: Tensor | None,
    predictors: Sequence[PredictsDeviationRate] = (),
) -> list[NormStep]:
    """What is known of the groups that an optimizer is about to move. Groups of one kind are observed together.

    Args:
        groups: The core groups of the module. Those in which a trained core has no gradient are left out.
        trainer: The Trainer of the run.
        module: The module that is trained.
        optimizer: The optimizer, with gradients.
        scale: The factor that the gradients still carry.
        predictors: Callbacks that will scale cores before the step.
    """
    check_owners(groups, trainer.optimizers)  # again, because cores may have been unfrozen
    settings, sharpness = settings_of(optimizer), _sharpness(module)
    known = None if sharpness is None else {id(parameter) for parameter in sharpness.parameters}
    kinds: dict[object, list[tuple[CoreGroup, list[Tensor]]]] = {}
    for group in groups:
        cores = trained_cores(group, settings)
        if cores and all(core.grad is not None and (known is None or id(core) in known) for core in cores):
            kind = cores[0].device, tuple(id(settings[id(core)]) for core in cores)
            kinds.setdefault(kind, []).append((group, cores))
    return [
        _observe_kind(members, settings, sharpness, trainer, optimizer, scale, predictors) for members in kinds.values()
    ]


def _observe_kind(
    members: Sequence[tuple[CoreGroup, list[Tensor]]],
    settings: Mapping[int, dict[str, Any]],
    sharpness: SharpnessState | None,
    trainer: Trainer,
    optimizer: Optimizer,
    scale: Tensor | None,
    predictors: Sequence[PredictsDeviationRate],
) -> NormStep:
    cores = [core for _, own in members for core in own]
    s = squared_norms(cores).view(len(members), -1)
    given = squared_grad_norms(cores).view_as(s)
    taken = given if scale is None else given / scale.to(given).square()
    # Under SAM the gradients for the optimizer are those at the perturbed weights.
    gamma = None if sharpness is None else sharpness.squared_grad_norms_of(cores)
    setting, lr = _common_setting([settings[id(core)] for core in members[0][1]])
    callback_rate = torch.zeros_like(s[:, 0])
    for each in predictors:
        callback_rate = callback_rate + each.deviation_rate(trainer, optimizer, s, taken, setting)
    return NormStep(
        groups=[group for group, _ in members],
        cores=cores,
        s=s,
        gamma=taken if gamma is None else gamma.view_as(s),
        by_sam=sharpness is not None,
        grad_norm=given.sum(-1).sqrt() if scale is None else None,
        sam_rate=_sam_rate(sharpness, s, cores),
        callback_rate=callback_rate,
        optimizer=optimizer,
        setting=setting,
        lr=lr,
    )


def _common_setting(settings: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], float | None]:
    """The setting of the first core, and the learning rate; None if rates differ between the cores."""
    first = {name: _number(value) for name, value in settings[0].items() if name != "params"}
    same = all(_number(each.get(name)) == first.get(name) for each in settings for name in _RATE_SETTINGS)
    return first, first["lr"] if same else None


def _number(value: Any) -> Any:
    """The number in a tensor, which a scheduler changes in place."""
    return value.item() if isinstance(value, Tensor) else value


def _sharpness(module: LightningModule) -> SharpnessState | None:
    state = getattr(module, "sharpness_state", None)
    return state if isinstance(state, SharpnessState) else None


def _sam_rate(state: SharpnessState | None, s: Tensor, cores: Sequence[Tensor]) -> Tensor:
    steering = None if state is None or state.adaptive else state.steering_of(cores)
    if state is None or steering is None:
        return torch.zeros_like(s[:, 0])
    return sam_deviation_rate(s, steering.view_as(s), state.rho, grad_norm=1.0)  # uγ is divided already
