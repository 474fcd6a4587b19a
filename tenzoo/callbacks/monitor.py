"""Watching the norms of the cores during training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tenzoo.callbacks.groups import (
    CoreCallback,
    PredictsDeviationRate,
    check_first_order,
    check_owners,
    groups_for,
    trained_cores,
)
from tenzoo.callbacks.norm_step import QUANTITIES, NormStep, as_clipped, squared_grad_norms, step_rows, total_of
from tenzoo.cores import CoreGroup
from tenzoo.dynamics import SharpnessState, sam_deviation_rate, squared_norms
from tenzoo.training import (
    after_clipping,
    forget_clipping,
    gradient_scale,
    log_to_loggers,
    logs_this_step,
    settings_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = QUANTITIES[3:]
"""Those that mean something for one learning rate above 0."""


@dataclass(frozen=True, eq=False)
class _Column:
    """What a step did to one group."""

    values: Tensor
    """As :func:`step_rows` gives them, then whether the optimizer has found infinite gradients and skipped the step."""
    lr: float | None


class NormDynamicsMonitor(CoreCallback):
    """Log the norm dynamics of every core group at each step that is logged, and draw them when training ends.

    For each group, and for ``total`` over all that are trained, in batches in which all of them step (sums; the
    normalized deviation is that of the summed squares):

    ================================  ==================================================================================
    ``norms/…/deviation``             Q of Definition 1 in arXiv:2508.10435, before the step
    ``norms/…/normalized_deviation``  ``Q/s̄²``, which does not grow with the weights
    ``norms/…/covariance``            Cov of squared norms and squared gradient norms
    ``norms/…/predicted_rate``        dQ/dt: Theorem 3 for SAM and DAS, plain SGD's own ``ρ_eff``, and weight decay
    ``norms/…/measured_rate``         ΔQ of this very step, divided by its learning rate
    ``norms/…/effective_rho``         ``ρ_eff = η‖g‖/2``, to be compared with ρ and α
    ================================  ==================================================================================

    The last three are left out where there is no one learning rate above 0: while it is 0, for a group whose cores have
    different learning rates, momenta or weight decays, and for the total of groups with different learning rates.

    Gradients are those that the optimizer takes, clipped if they are, the mean of all batches that it accumulates;
    under SAM those at the unperturbed weights. The prediction is first-order theory for SGD without momentum. With
    momentum β it covers what SAM and weight decay add, times ``1/(1 − β)``, which the momentum comes to after some
    steps, and what DAS adds; with another optimizer what SAM, DAS and decoupled weight decay add. The measured rate
    holds the rest: decay by the gradient of an adaptive optimizer, all that ASGD makes of decay and averages, and what
    clipping by value does, which turns the gradient. Of a group with frozen cores all quantities are those of the
    others, as DAS takes it. A group in which a trained core has no gradient is left out of the step, and a step that
    the gradient scaler skips is left out. Of several steps of a group in one batch the last is logged.

    At the end of training ``norm_dynamics.png``, Q and Cov against optimizer steps, is written to the log directory of
    the first logger.

    Raises:
        ValueError: From ``fit``, before training, for a model without core groups, or LBFGS, whose step takes many.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[NormDynamicsMonitor()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._groups: list[CoreGroup] = []
        self._steps: dict[int, list[NormStep]] = {}
        self._columns: dict[str, list[_Column]] = {}
        self._hooks: dict[int, list[RemovableHandle]] = {}
        self._history: dict[str, list[tuple[int, float, float]]] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # What other callbacks do to the cores just before a step is part of it: this one looks first.
        trainer.callbacks = [self, *(each for each in trainer.callbacks if each is not self)]  # type: ignore[attr-defined]
        if stage == "fit" and trainer.global_step == 0:  # otherwise the trainer goes on; a checkpoint comes later
            self._history = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._groups = groups_for(self, pl_module)
        self._unhook()
        check_first_order(self, trainer)
        check_owners(self._groups, trainer.optimizers)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:  # only now: a search for the learning rate steps them before
            self._hook(trainer, pl_module, optimizer)

    # --- in the step -------------------------------------------------------------------------------------------
    # Each hook asks first whether there is anything to do: forty-nine of fifty steps are not logged.

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._forget()  # what a batch that failed has left

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not logs_this_step(trainer):
            return
        scale = gradient_scale(trainer, optimizer)
        self._steps[id(optimizer)] = self._about_to(
            trainer, pl_module, optimizer, scale, predicting=_predicting(trainer)
        )
        after_clipping(trainer, lambda: self._clipped(optimizer))
        if id(optimizer) not in self._hooks:
            self._hook(trainer, pl_module, optimizer)

    def _hook(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            """Of a step that Lightning does not announce: one of the optimizer that it has wrapped."""
            has_closure = len(args) > 1 or kwargs.get("closure") is not None  # the optimizer comes first
            if not has_closure and id(optimizer) not in self._steps and logs_this_step(trainer):
                scale = getattr(optimizer, "grad_scale", None)
                self._steps[id(optimizer)] = self._about_to(trainer, module, optimizer, scale)

        def after(optimizer: Optimizer, *_: Any) -> None:
            """Right after the cores have moved. A step that is skipped does not come here."""
            steps = self._steps.pop(id(optimizer), None)
            if steps is not None:
                self._stepped(optimizer, steps)
            elif logs_this_step(trainer):
                rank_zero_warn(
                    "NormDynamicsMonitor leaves out a step with a closure that went past Lightning; "
                    "call `step(closure)` of what `self.optimizers()` gives"
                )

        self._hooks[id(optimizer)] = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]

    def _about_to(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: Optimizer,
        scale: Tensor | None,
        predicting: Sequence[PredictsDeviationRate] = (),
    ) -> list[NormStep]:
        """What is known of the groups that the optimizer is about to move, those of one kind together.

        Args:
            trainer: In training.
            module: That it trains.
            optimizer: With gradients.
            scale: What they are still multiplied by.
            predicting: Callbacks that are to scale cores before the step, and predict what that does.
        """
        check_owners(self._groups, trainer.optimizers)  # again where cores were thawed
        settings, state = settings_of(optimizer), _sharpness(module)
        known = None if state is None else {id(parameter) for parameter in state.parameters}
        kinds: dict[object, list[tuple[CoreGroup, list[Tensor]]]] = {}
        for group in self._groups:
            cores = trained_cores(group, settings)
            if cores and all(core.grad is not None and (known is None or id(core) in known) for core in cores):
                kind = cores[0].device, tuple(id(settings[id(core)]) for core in cores)
                kinds.setdefault(kind, []).append((group, cores))
        with torch.no_grad():
            return [
                self._step(
                    trainer, state, optimizer, alike, [settings[id(core)] for core in alike[0][1]], scale, predicting
                )
                for alike in kinds.values()
            ]

    def _step(
        self,
        trainer: Trainer,
        state: SharpnessState | None,
        optimizer: Optimizer,
        alike: Sequence[tuple[CoreGroup, list[Tensor]]],
        settings: Sequence[dict[str, Any]],
        scale: Tensor | None,
        predicting: Sequence[PredictsDeviationRate],
    ) -> NormStep:
        cores = [core for _, cores in alike for core in cores]
        s = squared_norms(cores).view(len(alike), -1)
        given = squared_grad_norms(cores).view_as(s)
        taken = given if scale is None else given / scale.to(given).square()
        # Under SAM the gradients that the optimizer takes are those at the perturbed weights.
        gamma = None if state is None else state.squared_grad_norms_of(cores)
        gamma = taken if gamma is None else gamma.view_as(s)
        setting = {name: _now(value) for name, value in settings[0].items() if name != "params"}
        same = all(_now(each.get(name)) == setting.get(name) for each in settings for name in _SETTINGS)
        callback_rate = torch.zeros_like(s[:, 0])
        for callback in predicting:
            callback_rate = callback_rate + callback.deviation_rate(trainer, optimizer, s, taken, setting)
        return NormStep(
            [group for group, _ in alike],
            cores,
            s,
            gamma,
            state is not None,
            given.sum(-1).sqrt() if scale is None else None,
            _sam_rate(state, s, cores),
            callback_rate,
            optimizer,
            setting,
            setting["lr"] if same else None,
        )

    def _clipped(self, optimizer: Optimizer) -> None:
        """Of the gradients, just before the optimizer takes them: some optimizers change them in their step."""
        with torch.no_grad():
            self._steps[id(optimizer)] = [as_clipped(step) for step in self._steps.get(id(optimizer), [])]

    def _stepped(self, optimizer: Optimizer, steps: Sequence[NormStep]) -> None:
        found = getattr(optimizer, "found_inf", None)  # of optimizers that skip steps themselves
        with torch.no_grad():
            for step in steps:
                table = step_rows(step, squared_norms(step.cores).view_as(step.s))
                skipped = torch.zeros_like(table[:1]) if found is None else found.to(table).expand_as(table[:1])
                for group, values in zip(step.groups, torch.cat([table, skipped]).unbind(1), strict=True):
                    self._columns.setdefault(group.name, []).append(_Column(values, step.lr))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._columns:
            with torch.no_grad():
                self._log(trainer)
        self._forget()

    def _forget(self) -> None:
        self._steps, self._columns = {}, {}

    def _log(self, trainer: Trainer) -> None:
        found = [(group, column) for group in self._groups for column in self._columns.get(group.name, [])]
        device = found[0][1].values.device
        table = torch.stack([column.values.to(device) for _, column in found], dim=1).cpu()
        columns, rates = {}, {}
        for (group, column), (*_, skipped), values in zip(found, table.t().tolist(), table[:-1].unbind(1), strict=True):
            if not skipped:  # of several steps the last remains
                columns[group.name], rates[group.name] = values, column.lr
        if not columns:
            return
        lr = next(iter(rates.values())) if len(set(rates.values())) == 1 else None
        every = torch.stack(list(columns.values()), dim=1)
        settings = {key: group for each in trainer.optimizers for key, group in settings_of(each).items()}
        if all(group.name in columns for group in self._groups if trained_cores(group, settings)):
            columns["total"] = total_of(every, lr or 0.0) if len(columns) > 1 else every[:, 0]
            rates["total"] = lr
        rows = {name: dict(zip(QUANTITIES, column.tolist(), strict=False)) for name, column in columns.items()}
        for name, row in rows.items():
            self._history.setdefault(name, []).append((trainer.global_step, row["deviation"], row["covariance"]))
        logged = {
            f"norms/{name}/{key}": value
            for name, row in rows.items()
            for key, value in row.items()
            if rates[name] or key not in _RATES
        }
        log_to_loggers(trainer, logged)

    # --- after training ----------------------------------------------------------------------------------------

    def _unhook(self) -> None:
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        self._hooks.clear()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unhook()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        forget_clipping(trainer)
        self._unhook()
        self._forget()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": {name: list(rows) for name, rows in self._history.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        steps = state_dict.get("steps")  # of older checkpoints, whose rows had none
        self._history = {
            name: [
                tuple(row) if steps is None else (step, *row)
                for step, row in zip(rows if steps is None else steps[len(steps) - len(rows) :], rows, strict=True)
            ]
            for name, rows in state_dict["history"].items()
        }

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        directory = trainer.log_dir  # a collective under DDP: asked on every rank
        if trainer.is_global_zero and trainer.loggers and directory is not None and self._history:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self.figure().savefig(Path(directory) / "norm_dynamics.png", dpi=120)

    def figure(self) -> "Figure":
        """Q and Cov against optimizer steps, a line for each group."""
        from matplotlib.figure import Figure  # only here: training itself does without

        figure = Figure(figsize=(10, 4), layout="constrained")
        deviation, covariance = figure.subplots(1, 2)
        names = [name for name in self._history if name != "total" or len(self._history) > 2]
        for name in names:
            steps, deviations, covariances = zip(*self._history[name], strict=True)
            style: dict[str, Any] = {"color": "black", "linewidth": 2} if name == "total" else {"linewidth": 1.2}
            deviation.plot(steps, deviations, label=name, **style)
            covariance.plot(steps, covariances, label=name, **style)
        deviation.set(title="Norm Deviation  Q", xlabel="optimizer step", yscale="log")
        covariance.set(title="Covariance of squared norms and gradient norms", xlabel="optimizer step")
        largest = max((abs(row[2]) for name in names for row in self._history[name]), default=0.0)
        if largest > 0:
            covariance.set_yscale("symlog", linthresh=largest * 1e-6)
        covariance.axhline(0, color="gray", linewidth=0.8)
        for axes in (deviation, covariance):
            axes.grid(alpha=0.3)
        if len(names) <= 12:
            deviation.legend(fontsize="small")
        return figure


_SETTINGS = ("lr", "momentum", "weight_decay")
"""On which the rates depend."""


def _now(value: Any) -> Any:
    """A setting as it is, where it is a tensor that a scheduler changes."""
    return value.item() if isinstance(value, Tensor) else value


def _predicting(trainer: Trainer) -> list[PredictsDeviationRate]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, PredictsDeviationRate)]


def _sharpness(module: LightningModule) -> SharpnessState | None:
    state = getattr(module, "sharpness_state", None)
    return state if isinstance(state, SharpnessState) else None


def _sam_rate(state: SharpnessState | None, s: Tensor, cores: Sequence[Tensor]) -> Tensor:
    steering = None if state is None or state.adaptive else state.steering_of(cores)
    if state is None or steering is None:
        return torch.zeros_like(s[:, 0])
    return sam_deviation_rate(s, steering.view_as(s), state.rho, grad_norm=1.0)  # which divides no more
