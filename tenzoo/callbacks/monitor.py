"""Watching the norms of the cores during training."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from typing_extensions import override

from tenzoo.callbacks.groups import groups_for
from tenzoo.callbacks.scaling import DeviationAwareScaling
from tenzoo.cores import CoreGroup
from tenzoo.dynamics import (
    SharpnessState,
    effective_rho,
    norm_deviation,
    norm_gradient_covariance,
    sam_deviation_rate,
    squared_norms,
)
from tenzoo.training import gradient_scale, log_to_loggers, logs_this_step, settings_of


@dataclass(frozen=True, eq=False)
class _Step:
    """What is known of a group just before the optimizer's step."""

    s: Tensor
    gamma: Tensor
    grad_norm: Tensor
    """Of what the optimizer is given, before it is clipped."""
    sam_rate: Tensor
    das_rate: Tensor
    optimizer: Optimizer
    setting: dict[str, Any]


class NormDynamicsMonitor(Callback):
    """Log the norm dynamics of every core group at each step that is logged, and draw them when training ends.

    For each group, and for ``total`` over all of them (sums; the normalized deviation is that of the summed squares):

    ================================  ==================================================================================
    ``norms/…/deviation``             Q of Definition 1 in arXiv:2508.10435, before the step
    ``norms/…/normalized_deviation``  ``Q/s̄²``, which does not grow with the weights
    ``norms/…/covariance``            Cov of squared norms and squared gradient norms
    ``norms/…/predicted_rate``        dQ/dt: Theorem 3 for SAM and DAS, plain SGD's own ``ρ_eff``, and weight decay
    ``norms/…/measured_rate``         ΔQ of this very step, divided by the learning rate
    ``norms/…/effective_rho``         ``ρ_eff = η‖g‖/2``, to be compared with ρ and α
    ================================  ==================================================================================

    Gradients are those that the optimizer takes, clipped if it is; under SAM those at the unperturbed weights. The
    prediction is first-order theory for SGD without momentum: with another optimizer it covers what SAM and DAS add,
    and the measured rate holds the rest. A group in which a core is frozen or has no gradient is left out of the step.

    At the end of training ``norm_dynamics.png``, Q and Cov against optimizer steps, is written to the log directory of
    the first logger.

    Raises:
        ValueError: From ``fit``, before training, for a model without core groups.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[NormDynamicsMonitor()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._groups: list[CoreGroup] = []
        self._before: dict[str, Tensor] = {}
        self._stepping: dict[str, _Step] = {}
        self._steps: list[int] = []
        self._history: dict[str, list[tuple[float, float]]] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._groups = groups_for(self, pl_module)

    # --- in the step -------------------------------------------------------------------------------------------
    # Each hook asks first whether there is anything to do: forty-nine of fifty steps are not logged.

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not logs_this_step(trainer):
            return
        # Taken here, since a callback that scales the cores may run before the next hook of this one.
        with torch.no_grad():
            self._before = {group.name: _exact_norms(_trainable(group)) for group in self._groups if _trainable(group)}

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._before:
            return
        settings = settings_of(optimizer)
        with torch.no_grad():
            for group in self._groups:
                cores = _trainable(group)
                if not cores or any(core.grad is None or id(core) not in settings for core in cores):
                    continue
                gamma = _squared_grad_norms(trainer, pl_module, optimizer, cores)
                if gamma is None:
                    continue
                s, setting = self._before[group.name], settings[id(cores[0])]
                self._stepping[group.name] = _Step(
                    s,
                    gamma,
                    _grad_norm(cores),
                    _sam_rate(pl_module, s, gamma),
                    _das_rate(trainer, optimizer, s, gamma, setting),
                    optimizer,
                    setting,
                )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._before:
            return
        if self._stepping:
            with torch.no_grad():
                self._log(trainer)
        self._before, self._stepping = {}, {}

    def _log(self, trainer: Trainer) -> None:
        cores = {group.name: _trainable(group) for group in self._groups}
        steps = {name: _as_clipped(step, cores[name]) for name, step in self._stepping.items()}
        rows = {name: _row(step, _exact_norms(cores[name])) for name, step in steps.items()}
        only = next(iter(rows.values())) if len(rows) == 1 else None
        rows["total"] = _total(rows, list(steps.values())) if only is None else only
        values = torch.stack([value.double() for row in rows.values() for value in row.values()]).tolist()
        numbers = iter(values)
        floats = {name: {quantity: next(numbers) for quantity in row} for name, row in rows.items()}
        self._steps.append(trainer.global_step)
        for name, row in floats.items():
            self._history.setdefault(name, []).append((row["deviation"], row["covariance"]))
        logged = {f"norms/{name}/{key}": value for name, row in floats.items() for key, value in row.items()}
        log_to_loggers(trainer, logged)

    # --- after training ----------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self._steps), "history": {name: list(rows) for name, rows in self._history.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = list(state_dict["steps"])
        self._history = {name: [tuple(row) for row in rows] for name, rows in state_dict["history"].items()}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        directory = trainer.log_dir  # a collective under DDP: asked on every rank
        if trainer.is_global_zero and trainer.loggers and directory is not None and self._steps:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self.figure().savefig(Path(directory) / "norm_dynamics.png", dpi=120)

    def figure(self) -> Figure:
        """Q and Cov against optimizer steps, a line for each group."""
        figure = Figure(figsize=(10, 4), layout="constrained")
        deviation, covariance = figure.subplots(1, 2)
        names = [name for name in self._history if name != "total" or len(self._history) > 2]
        for name in names:
            rows = self._history[name]
            steps = self._steps[-len(rows) :]
            style: dict[str, Any] = {"color": "black", "linewidth": 2} if name == "total" else {"linewidth": 1.2}
            deviation.plot(steps, [row[0] for row in rows], label=name, **style)
            covariance.plot(steps, [row[1] for row in rows], label=name, **style)
        deviation.set(title="Norm Deviation  Q", xlabel="optimizer step", yscale="log")
        covariance.set(title="Covariance of squared norms and gradient norms", xlabel="optimizer step")
        largest = max((abs(row[1]) for name in names for row in self._history[name]), default=0.0)
        if largest > 0:
            covariance.set_yscale("symlog", linthresh=largest * 1e-6)
        covariance.axhline(0, color="gray", linewidth=0.8)
        for axes in (deviation, covariance):
            axes.grid(alpha=0.3)
        if len(names) <= 12:
            deviation.legend(fontsize="small")
        return figure


def _trainable(group: CoreGroup) -> list[Tensor]:
    return [core for core in group.cores if core.requires_grad]


def _squared_grad_norms(
    trainer: Trainer, module: LightningModule, optimizer: Optimizer, cores: Sequence[Tensor]
) -> Tensor | None:
    """γ of the cores: under SAM that of the unperturbed weights, else that in ``.grad``, without any loss scale."""
    state = _sharpness(module)
    if state is not None:
        return state.squared_grad_norms_of(cores)
    gamma = squared_norms([core.grad for core in cores if core.grad is not None])
    scale = gradient_scale(trainer, optimizer)
    return gamma if scale is None else gamma / scale.to(gamma).square()


def _sharpness(module: LightningModule) -> SharpnessState | None:
    state = getattr(module, "sharpness_state", None)
    return state if isinstance(state, SharpnessState) else None


def _exact_norms(cores: Sequence[Tensor]) -> Tensor:
    """Squared norms in float64, where there is one: a step moves Q by less than float32 can tell."""
    return squared_norms([core if core.device.type == "mps" else core.double() for core in cores])


def _grad_norm(cores: Sequence[Tensor]) -> Tensor:
    return squared_norms([core.grad for core in cores if core.grad is not None]).sum().sqrt()


def _as_clipped(step: _Step, cores: Sequence[Tensor]) -> _Step:
    """The step with the gradient as the optimizer saw it: it is clipped after the callbacks have run."""
    if any(core.grad is None for core in cores):
        return step
    kept = (_grad_norm(cores) / step.grad_norm).nan_to_num(1.0, posinf=1.0)
    return dataclasses.replace(step, gamma=step.gamma * kept.square(), sam_rate=step.sam_rate * kept)


def _sam_rate(module: LightningModule, s: Tensor, gamma: Tensor) -> Tensor:
    state = _sharpness(module)
    if state is None or state.adaptive:
        return torch.zeros_like(s[0])
    return sam_deviation_rate(s, gamma, state.rho, grad_norm=state.grad_norm)


def _das_rate(trainer: Trainer, optimizer: Optimizer, s: Tensor, gamma: Tensor, setting: dict[str, Any]) -> Tensor:
    rate = torch.zeros_like(s[0])
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, DeviationAwareScaling):
            rate = rate + callback.deviation_rate(trainer, optimizer, s, gamma, setting)
    return rate


def _predicted_rate(step: _Step) -> Tensor:
    rate = step.sam_rate + step.das_rate
    if isinstance(step.optimizer, SGD) and not step.setting["momentum"]:
        rate = rate + sam_deviation_rate(step.s, step.gamma, effective_rho(step.gamma, step.setting["lr"]))
    if isinstance(step.optimizer, SGD | AdamW):
        rate = rate - 4 * step.setting["weight_decay"] * norm_deviation(step.s)
    return rate


def _row(step: _Step, after: Tensor) -> dict[str, Tensor]:
    deviation = norm_deviation(step.s)
    return {
        "deviation": deviation,
        "normalized_deviation": deviation / step.s.mean().square(),
        "covariance": norm_gradient_covariance(step.s, step.gamma),
        "predicted_rate": _predicted_rate(step),
        "measured_rate": (norm_deviation(after) - deviation) / step.setting["lr"],
        "effective_rho": effective_rho(step.gamma, step.setting["lr"]),
    }


def _total(rows: dict[str, dict[str, Tensor]], steps: Sequence[_Step]) -> dict[str, Tensor]:
    device = steps[0].s.device
    total = {
        quantity: torch.stack([row[quantity].to(device) for row in rows.values()]).sum()
        for quantity in ("deviation", "normalized_deviation", "covariance", "predicted_rate", "measured_rate")
    }
    total["normalized_deviation"] = total["deviation"] / sum(step.s.mean().to(device).square() for step in steps)
    gamma = torch.cat([step.gamma.to(device) for step in steps])
    total["effective_rho"] = effective_rho(gamma, steps[0].setting["lr"])
    return total
