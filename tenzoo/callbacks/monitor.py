"""A monitor of the norms of cores during training."""

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

from tenzoo.callbacks.groups import CoreCallback, check_first_order, check_owners, groups_for, trained_cores
from tenzoo.callbacks.norm_figure import draw_history
from tenzoo.callbacks.norm_step import QUANTITIES, NormStep, as_clipped, step_rows, total_of
from tenzoo.callbacks.observation import observe_step, rate_predictors
from tenzoo.cores import CoreGroup
from tenzoo.dynamics import squared_norms
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
"""The quantities that need one learning rate above 0."""


@dataclass(frozen=True, eq=False)
class _Column:
    """What a step did to one group."""

    values: Tensor
    """The rows of :func:`step_rows`, then 1 if the optimizer found infinite gradients and skipped the step, else 0."""
    lr: float | None


class NormDynamicsMonitor(CoreCallback):
    """Log the norm dynamics of every core group at each logged step, and draw them when training ends.

    For each group, and in batches in which all trained groups step also for their ``total`` (sums; the normalized
    deviation is that of the summed squares):

    ================================  ==================================================================================
    ``norms/…/deviation``             Q of Definition 1 in arXiv:2508.10435, before the step
    ``norms/…/normalized_deviation``  ``Q/s̄²``, which does not grow with the weights
    ``norms/…/covariance``            Cov of squared norms and squared gradient norms
    ``norms/…/predicted_rate``        dQ/dt of SAM (Theorem 3), plain SGD (``ρ_eff``), weight decay, and callbacks
    ``norms/…/measured_rate``         ΔQ of this step, divided by its learning rate
    ``norms/…/effective_rho``         ``ρ_eff = η‖g‖/2``, comparable with ρ and α
    ================================  ==================================================================================

    The last three need one learning rate above 0. They are left out while it is 0, for a group whose cores have
    different learning rates, momenta or weight decays, and for the total of groups with different learning rates.

    Gradients are those that the optimizer takes: clipped, and the mean of all accumulated batches. Under SAM they are
    those at the unperturbed weights.

    The prediction is first-order theory for SGD without momentum. With momentum β it covers SAM and weight decay,
    multiplied by ``1/(1 − β)`` as after some steps, and callbacks. With another optimizer it covers SAM, callbacks and
    decoupled weight decay. Callbacks are those that have the method of
    :class:`~tenzoo.callbacks.PredictsDeviationRate`, such as DAS. The measured rate holds the rest: weight decay that
    goes through the gradient of an adaptive optimizer, weight decay and averages of ASGD, and clipping by value, which
    turns the gradient.

    Frozen cores are left out of their group, as in DAS. A group in which a trained core has no gradient is left out of
    the step, and a step that the gradient scaler skips is left out. Of several steps of a group in one batch the last
    is logged.

    At the end of training ``norm_dynamics.png``, Q and Cov against optimizer steps, is written to the log directory of
    the first logger.

    Raises:
        ValueError: From ``fit``, before training, for a model without core groups, or LBFGS, which takes many steps in
            one.

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
        # First in the list: what other callbacks do to the cores just before a step is part of the step.
        trainer.callbacks = [self, *(each for each in trainer.callbacks if each is not self)]  # type: ignore[attr-defined]
        if stage == "fit" and trainer.global_step == 0:  # else the same trainer continues
            self._history = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._groups = groups_for(self, pl_module)
        self._unhook()
        check_first_order(self, trainer)
        check_owners(self._groups, trainer.optimizers)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:  # not earlier: a search for the learning rate steps them before
            self._hook(trainer, pl_module, optimizer)

    # --- in the step -------------------------------------------------------------------------------------------
    # Each hook asks first whether the step is logged: 49 of 50 are not.

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._forget()  # the rest of a batch that failed

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not logs_this_step(trainer):
            return
        self._steps[id(optimizer)] = observe_step(
            self._groups,
            trainer,
            pl_module,
            optimizer,
            scale=gradient_scale(trainer, optimizer),
            predictors=rate_predictors(trainer),
        )
        after_clipping(trainer, lambda: self._clipped(optimizer))
        if id(optimizer) not in self._hooks:
            self._hook(trainer, pl_module, optimizer)

    def _hook(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            """Observe a step that Lightning does not announce, of the optimizer that Lightning wraps."""
            has_closure = len(args) > 1 or kwargs.get("closure") is not None  # the optimizer comes first
            if not has_closure and id(optimizer) not in self._steps and logs_this_step(trainer):
                scale = getattr(optimizer, "grad_scale", None)
                self._steps[id(optimizer)] = observe_step(self._groups, trainer, module, optimizer, scale=scale)

        def after(optimizer: Optimizer, *_: Any) -> None:
            """Measure the step. It is not called for a step that is skipped."""
            steps = self._steps.pop(id(optimizer), None)
            if steps is not None:
                self._stepped(optimizer, steps)
            elif logs_this_step(trainer):
                rank_zero_warn(
                    "NormDynamicsMonitor leaves out a step with a closure of an optimizer without Lightning's wrapper; "
                    "call `step(closure)` of the optimizers that `self.optimizers()` returns"
                )

        self._hooks[id(optimizer)] = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]

    def _clipped(self, optimizer: Optimizer) -> None:
        """Observe the gradients after clipping. Some optimizers change them in their step."""
        with torch.no_grad():
            self._steps[id(optimizer)] = [as_clipped(step) for step in self._steps.get(id(optimizer), [])]

    def _stepped(self, optimizer: Optimizer, steps: Sequence[NormStep]) -> None:
        found = getattr(optimizer, "found_inf", None)  # set for optimizers that skip steps themselves
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
            if not skipped:  # of several steps the last one counts
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
        steps = state_dict.get("steps")  # older checkpoints have the steps here, and not in the rows
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
        return draw_history(self._history)
