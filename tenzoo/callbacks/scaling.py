"""Deviation-Aware Scaling as a callback, for any model with cores and any first-order optimizer."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import SGD, Optimizer
from typing_extensions import override

from tenzoo.callbacks.groups import CoreCallback, check_first_order, check_owners, groups_for, trained_cores
from tenzoo.callbacks.stacked_groups import FactorRecord, StackedGroups, per_core
from tenzoo.cores import CoreGroup
from tenzoo.dynamics import bound_factors, deviation_aware_factors, own_part, sam_deviation_rate, squared_norms
from tenzoo.training import gradient_scale, log_to_loggers, logs_this_step, settings_of, steps_of_run, steps_so_far


class DeviationAwareScaling(CoreCallback):
    """Scale each core by ``1 + λ_k`` just before the optimizer's step: SAM's norm dynamics without a second gradient.

    ``λ_k = η α u (γ_k − γ̄)/s_k`` (Cao et al., 2025, arXiv:2508.10435, Algorithm 2; see
    :func:`tenzoo.dynamics.deviation_aware_factors`), with the learning rate η of the core's own parameter group. The
    gradients are accumulated, averaged over ranks, and not yet clipped. Only steps that are logged wait for the device.

    A group is not scaled in a step in which fewer than two of its cores are trainable, a gradient is missing or not
    finite, or all gradients are zero. With several optimizers, the groups of each are scaled when it steps.

    Logs ``das/max_abs_lambda``, the largest ``|λ|`` before the bound since the last log, and ``das/bound_hit_rate``,
    the fraction of scalings in which the bound was hit.

    Args:
        alpha: Strength α ≥ 0, comparable with SAM's ρ. At 0, training equals that without the callback bit for bit.
        gauge_fixed: Scale by ``exp(λ_k)`` with ``Σ λ_k = 0``, which does not change the tensor of a group.
        normalizer: Whether ``u = 1/‖g‖`` takes the norm over the ``"group"`` (Algorithm 2) or, as SAM, ``"global"``
            over all parameters of the optimizer.
        alpha_schedule: Let α fall to 0 over the optimizer steps of the run: ``"cosine"`` or ``"linear"``.
        momentum_correction: Use ``α/(1 − β)``. SGD's momentum β multiplies gradients by this, and not the scaling.
        max_scale: Bound on ``|λ|`` in one step; a group beyond it is shrunk by one common factor.

    Raises:
        ValueError: For a value out of its range; from ``fit``, before training, for a model without core groups, a
            group divided between two optimizers, LBFGS, half-precision cores, ``momentum_correction`` without SGD's
            momentum, or a schedule without an end. Cores that are unfrozen later are checked then.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[DeviationAwareScaling(0.001)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        alpha: float,
        *,
        gauge_fixed: bool = False,
        normalizer: Literal["group", "global"] = "group",
        alpha_schedule: Literal["cosine", "linear"] | None = None,
        momentum_correction: bool = False,
        max_scale: float = 0.1,
    ) -> None:
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"expected a finite number >= 0 in `alpha`, got {alpha}")
        if normalizer not in ("group", "global"):
            raise ValueError(f"expected 'group' or 'global' in `normalizer`, got {normalizer!r}")
        if alpha_schedule not in (None, "cosine", "linear"):
            raise ValueError(f"expected 'cosine', 'linear' or None in `alpha_schedule`, got {alpha_schedule!r}")
        if not 0 < max_scale < 1:
            raise ValueError(f"expected a number between 0 and 1 in `max_scale`, got {max_scale}")
        self.alpha = alpha
        self.gauge_fixed = gauge_fixed
        self.normalizer = normalizer
        self.alpha_schedule = alpha_schedule
        self.momentum_correction = momentum_correction
        self.max_scale = max_scale
        self._groups: list[CoreGroup] = []
        self._plans: dict[int, tuple[object, list[StackedGroups]]] = {}
        self._total_steps = math.inf
        self._record = FactorRecord(max_scale)

    # --- before training ---------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._groups = groups_for(self, pl_module)
        check_first_order(self, trainer)
        for optimizer in trainer.optimizers:
            self._plans[id(optimizer)] = self._signature(optimizer), self._plan(trainer, optimizer)
        if self.alpha_schedule is not None:
            self._total_steps = steps_of_run(trainer, f"`alpha_schedule` {self.alpha_schedule!r}")
            if self._total_steps == trainer.max_steps:  # which counts the steps of all optimizers
                self._total_steps /= len(trainer.optimizers)
            if not math.isfinite(self._total_steps):
                raise ValueError(
                    f"expected max_steps or max_epochs on the Trainer for `alpha_schedule` {self.alpha_schedule!r}, "
                    "got a run without an end"
                )

    @staticmethod
    def _check_precision(group: CoreGroup) -> None:
        kinds = {core.dtype for core in group.cores if core.requires_grad}
        half = sorted(str(kind) for kind in kinds if kind in (torch.bfloat16, torch.float16))
        if half:
            raise ValueError(
                f"expected float32 or float64 cores for DeviationAwareScaling, got {half[0]} in {group.name!r}, where "
                "1 + 0.001 rounds to 1; train with precision 'bf16-mixed' or '16-mixed'"
            )

    @staticmethod
    def _signature(optimizer: Optimizer) -> object:
        """A value that changes when parameters join the optimizer, are frozen, or are unfrozen."""
        return [
            (id(group), [id(parameter) for parameter in group["params"] if parameter.requires_grad])
            for group in optimizer.param_groups
        ]

    def _plan(self, trainer: Trainer, optimizer: Optimizer) -> list[StackedGroups]:
        check_owners(self._groups, trainer.optimizers)  # again, because cores may have been unfrozen
        for group in self._groups:
            self._check_precision(group)
        settings = settings_of(optimizer)
        stacks: dict[object, StackedGroups] = {}
        for group in self._groups:
            cores = trained_cores(group, settings)
            if len(cores) < 2:
                continue
            key = (len(cores), cores[0].device, cores[0].dtype)
            stack = stacks.setdefault(key, StackedGroups([], [], len(cores)))
            stack.cores.extend(cores)
            stack.settings.extend(settings[id(core)] for core in cores)
        if self.momentum_correction:
            for stack in stacks.values():
                for setting in stack.settings:
                    self._check_momentum(optimizer, setting)
        return list(stacks.values())

    @staticmethod
    def _check_momentum(optimizer: Optimizer, setting: Mapping[str, Any]) -> None:
        if not isinstance(optimizer, SGD) or not setting["momentum"] > 0:
            raise ValueError(
                "expected SGD with momentum for `momentum_correction`, got "
                f"{type(optimizer).__name__} with momentum {setting.get('momentum')}"
            )

    # --- in the step -------------------------------------------------------------------------------------------

    def current_alpha(self, step: int) -> float:
        """α at a step of the run, counted from 0, before the correction for momentum."""
        if self.alpha_schedule is None:
            return self.alpha
        left = 1 - min(step / self._total_steps, 1)
        return self.alpha * (left if self.alpha_schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)

    def deviation_rate(
        self,
        trainer: Trainer,
        optimizer: Optimizer,
        squared_norms: Tensor,
        squared_grad_norms: Tensor,
        setting: Mapping[str, Any],
    ) -> Tensor:
        """``dQ/dt = 4αuK·Cov`` that this callback adds, in Theorem 3's first order and before the bound.

        See :class:`~tenzoo.callbacks.PredictsDeviationRate`.
        """
        unscale = gradient_scale(trainer, optimizer)
        norm = _norm_of_all(optimizer, unscale) if self.normalizer == "global" else None
        alpha = self._corrected(self.current_alpha(steps_so_far(trainer)), setting)
        return sam_deviation_rate(squared_norms, squared_grad_norms, alpha, grad_norm=norm)

    @override
    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        signature = self._signature(optimizer)
        if self._plans[id(optimizer)][0] != signature:
            self._plans[id(optimizer)] = signature, self._plan(trainer, optimizer)
        stacks = self._plans[id(optimizer)][1]
        if not all(core.grad is not None for stack in stacks for core in stack.cores):
            stacks = [kept for stack in stacks if (kept := stack.with_gradients()).cores]
        alpha = self.current_alpha(steps_so_far(trainer))
        unscale = gradient_scale(trainer, optimizer)
        norm = _norm_of_all(optimizer, unscale) if self.normalizer == "global" else None
        for stack in stacks:
            self._record.add(self._scale_(stack, alpha, norm, unscale))
        if logs_this_step(trainer) and not self._record.empty:
            log_to_loggers(trainer, self._record.flush())

    def _scale_(self, stack: StackedGroups, alpha: float, norm: Tensor | None, unscale: Tensor | None) -> Tensor:
        """Scale the cores of a stack; return λ before the bound, shape ``(G, K)``."""
        grads: list[Tensor] = [core.grad for core in stack.cores]  # type: ignore[misc]
        s, gamma = squared_norms([*stack.cores, *grads]).view(2, -1, stack.group_size).unbind()
        if unscale is not None:
            gamma = gamma / unscale.to(gamma).square()
        factors = deviation_aware_factors(
            s,
            gamma,
            lr=per_core([setting["lr"] for setting in stack.settings], s),
            alpha=per_core([self._corrected(alpha, setting) for setting in stack.settings], s),
            gauge_fixed=self.gauge_fixed,
            grad_norm=norm,
        )
        bounded = bound_factors(factors, self.max_scale)
        scales = bounded.exp() if self.gauge_fixed else bounded + 1
        torch._foreach_mul_(
            [own_part(core) for core in stack.cores], list(scales.to(stack.cores[0].dtype).flatten().unbind())
        )
        return factors

    def _corrected(self, alpha: float, setting: Mapping[str, Any]) -> float:
        """α/(1 − β) with the correction for momentum, else α."""
        return alpha / (1 - setting["momentum"]) if self.momentum_correction else alpha


def _norm_of_all(optimizer: Optimizer, unscale: Tensor | None) -> Tensor:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = squared_norms(grads).sum().sqrt()
    return norm if unscale is None else norm / unscale.to(norm)
