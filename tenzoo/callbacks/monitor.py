"""Watching the norms of the cores during training."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tenzoo.callbacks.groups import CoreCallback, groups_for
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_QUANTITIES = (
    "deviation",
    "normalized_deviation",
    "covariance",
    "predicted_rate",
    "measured_rate",
    "effective_rho",
)
"""What is logged of each group, in the order of the rows that :func:`_rows` gives first."""

_RATES = _QUANTITIES[3:]
"""Those that mean something for one learning rate above 0."""


@dataclass(frozen=True, eq=False)
class _Step:
    """What is known just before the optimizer's step of G groups of K cores each.

    They are computed with together, since each operation has a price of its own on an accelerator. They lie on one
    device and have the same settings of one optimizer.
    """

    groups: Sequence[CoreGroup]
    cores: Sequence[Tensor]
    """Those that are trained, of one group after another."""
    s: Tensor
    """Shape ``(G, K)``, as γ."""
    gamma: Tensor
    by_sam: bool
    """Whether γ is that of SAM's first pass, and not of what the optimizer is given."""
    grad_norm: Tensor | None
    """Of what the optimizer is given, before it is clipped, shape ``(G,)`` as the rates; None where the optimizer
    unscales it itself, which rules out clipping."""
    sam_rate: Tensor
    das_rate: Tensor
    optimizer: Optimizer
    setting: dict[str, Any]
    """As it is in this step: a scheduler may change it right after."""
    lr: float | None
    """None if the cores have different settings."""


@dataclass(frozen=True, eq=False)
class _Column:
    """What a step did to one group."""

    values: Tensor
    """As :func:`_rows` gives them."""
    lr: float | None
    scaled: bool
    """Whether the optimizer skips steps whose gradients are not finite, itself."""


class NormDynamicsMonitor(CoreCallback):
    """Log the norm dynamics of every core group at each step that is logged, and draw them when training ends.

    For each group, and for ``total`` over all of them (sums; the normalized deviation is that of the summed squares):

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

    Gradients are those that the optimizer takes, clipped if they are; under SAM those at the unperturbed weights. The
    prediction is first-order theory for SGD without momentum. With momentum β it covers what SAM and weight decay add,
    times ``1/(1 − β)``, which the momentum comes to after some steps, and what DAS adds; with another optimizer what
    SAM, DAS and decoupled weight decay add. The measured rate holds the rest, as it does that of clipping by value,
    which turns the gradient. Of a group with frozen cores all
    quantities are those of the others, as DAS takes it. A group in which a trained core has no gradient is left out of
    the step, and a step that the gradient scaler skips is left out. Of several steps of a group in one batch the last
    is logged.

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
        self._before: dict[str, Sequence[Tensor]] = {}
        self._steps: dict[int, list[_Step]] = {}
        self._columns: dict[str, _Column] = {}
        self._hooks: dict[int, RemovableHandle] = {}
        self._history: dict[str, list[tuple[int, float, float]]] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._groups = groups_for(self, pl_module)
        self._unhook()
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise ValueError(
                "expected a first-order optimizer for NormDynamicsMonitor, got LBFGS; leave one of them out"
            )

    # --- in the step -------------------------------------------------------------------------------------------
    # Each hook asks first whether there is anything to do: forty-nine of fifty steps are not logged.

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._forget()  # what a batch that failed has left
        if not logs_this_step(trainer):
            return
        # Taken here, since a callback that scales the cores may run before the next hook of this one.
        with torch.no_grad():
            for groups in _by(self._groups, lambda group: group.cores[0].device).values():
                norms = iter(squared_norms([core for group in groups for core in group.cores]).unbind())
                # Of all cores: which are frozen may change until the step.
                self._before.update((group.name, [next(norms) for _ in group.cores]) for group in groups)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._before:
            return
        settings = settings_of(optimizer)
        known = _known_to(_sharpness(pl_module))
        ready = [
            group
            for group in self._groups
            if (cores := _trainable(group))
            and all(core.grad is not None and id(core) in settings and known(core) for core in cores)
        ]

        def kind(group: CoreGroup) -> object:
            cores = _trainable(group)
            return cores[0].device, tuple(id(settings[id(core)]) for core in cores)

        with torch.no_grad():
            self._steps[id(optimizer)] = [
                self._step(
                    trainer, pl_module, optimizer, groups, [settings[id(core)] for core in _trainable(groups[0])]
                )
                for groups in _by(ready, kind).values()
            ]
        _after_clipping(trainer, lambda: self._clipped(optimizer))
        if id(optimizer) not in self._hooks:
            self._hooks[id(optimizer)] = optimizer.register_step_post_hook(self._after_step)

    def _step(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: Optimizer,
        groups: Sequence[CoreGroup],
        settings: Sequence[dict[str, Any]],
    ) -> _Step:
        cores = [core for group in groups for core in _trainable(group)]
        s = torch.stack(
            [
                norm
                for group in groups
                for core, norm in zip(group.cores, self._before[group.name], strict=True)
                if core.requires_grad
            ]
        ).view(len(groups), -1)
        given = _squared_grad_norms(cores).view_as(s)
        gamma, state = given, _sharpness(module)
        scale = gradient_scale(trainer, optimizer)
        if state is not None:  # then the gradients are those at the perturbed weights
            found = state.squared_grad_norms_of(cores)
            assert found is not None
            gamma = found.view_as(s)
        elif scale is not None:
            gamma = given / scale.to(given).square()
        setting = {name: _now(value) for name, value in settings[0].items() if name != "params"}
        alike = all(_now(each.get(name)) == setting.get(name) for each in settings for name in _SETTINGS)
        return _Step(
            groups,
            cores,
            s,
            gamma,
            state is not None,
            given.sum(-1).sqrt() if scale is None else None,
            _sam_rate(state, s, gamma),
            _das_rate(trainer, optimizer, s, gamma, setting),
            optimizer,
            setting,
            setting["lr"] if alike else None,
        )

    def _clipped(self, optimizer: Optimizer) -> None:
        """Of the gradients, just before the optimizer takes them: some optimizers change them in their step."""
        with torch.no_grad():
            self._steps[id(optimizer)] = [_as_clipped(step) for step in self._steps.get(id(optimizer), [])]

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Of the optimizer, right after it has moved the cores. A step that is skipped does not come here."""
        with torch.no_grad():
            for step in self._steps.pop(id(optimizer), []):
                after = squared_norms(step.cores)
                table = _rows(step, after.view_as(step.s))
                for group, values in zip(step.groups, table.unbind(1), strict=True):
                    self._columns[group.name] = _Column(values, step.lr, scaled=step.grad_norm is None)
                # Where the next step in this batch begins.
                norms = iter(after.unbind())
                for group in step.groups:
                    before = zip(group.cores, self._before[group.name], strict=True)
                    self._before[group.name] = [next(norms) if core.requires_grad else s for core, s in before]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._columns:
            with torch.no_grad():
                self._log(trainer)
        self._forget()

    def _forget(self) -> None:
        self._before, self._steps, self._columns = {}, {}, {}

    def _log(self, trainer: Trainer) -> None:
        found = {group.name: self._columns[group.name] for group in self._groups if group.name in self._columns}
        device = next(iter(found.values())).values.device
        table = torch.stack([column.values.to(device) for column in found.values()], dim=1).cpu()
        skipped = [
            column.scaled and not bool(sum_.isfinite()) for column, sum_ in zip(found.values(), table[-1], strict=True)
        ]
        names = [name for name, left_out in zip(found, skipped, strict=True) if not left_out]
        if not names:
            return
        table = table[:, [not left_out for left_out in skipped]]
        rates = {name: found[name].lr for name in names}
        columns = dict(zip(names, table.t(), strict=True))
        lr = next(iter(rates.values())) if len(set(rates.values())) == 1 else None
        columns["total"] = _total(table, lr or 0.0) if len(names) > 1 else table[:, 0]
        rates["total"] = lr
        rows = {name: dict(zip(_QUANTITIES, column.tolist(), strict=False)) for name, column in columns.items()}
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
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unhook()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        vars(trainer.precision_plugin).pop("_clip_gradients", None)
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


def _trainable(group: CoreGroup) -> list[Tensor]:
    return [core for core in group.cores if core.requires_grad]


_SETTINGS = ("lr", "momentum", "weight_decay")
"""On which the rates depend."""


def _now(value: Any) -> Any:
    """A setting as it is, where it is a tensor that a scheduler changes."""
    return value.item() if isinstance(value, Tensor) else value


def _by(groups: Iterable[CoreGroup], key: Callable[[CoreGroup], object]) -> dict[object, list[CoreGroup]]:
    """The groups by what they have in common, in their order."""
    buckets: dict[object, list[CoreGroup]] = {}
    for group in groups:
        buckets.setdefault(key(group), []).append(group)
    return buckets


def _squared_grad_norms(cores: Sequence[Tensor]) -> Tensor:
    """Of what is in ``.grad`` of each."""
    return squared_norms([core.grad for core in cores if core.grad is not None])


def _sharpness(module: LightningModule) -> SharpnessState | None:
    state = getattr(module, "sharpness_state", None)
    return state if isinstance(state, SharpnessState) else None


def _known_to(state: SharpnessState | None) -> Callable[[Tensor], bool]:
    """Whether SAM, if it is at work, has found a gradient of a core."""
    known = None if state is None else {id(parameter) for parameter in state.parameters}
    return lambda core: known is None or id(core) in known


def _after_clipping(trainer: Trainer, function: Callable[[], None]) -> None:
    """Call something once, when the gradients of the step that is about to be taken are as the optimizer takes them.

    Lightning has no hook there: callbacks run first, then the module's own hook, then it clips.
    """
    plugin = trainer.precision_plugin
    clip = plugin._clip_gradients

    def clip_and_call(*args: Any, **kwargs: Any) -> None:
        vars(plugin).pop("_clip_gradients", None)
        clip(*args, **kwargs)
        function()

    plugin._clip_gradients = clip_and_call  # type: ignore[method-assign]


def _as_clipped(step: _Step) -> _Step:
    """The step with the gradients as the optimizer saw them: they are clipped after the callbacks have run."""
    if step.grad_norm is None or any(core.grad is None for core in step.cores):
        return step
    clipped = _squared_grad_norms(step.cores).view_as(step.s)
    kept = (clipped.sum(-1).sqrt() / step.grad_norm).nan_to_num(1.0, posinf=1.0)
    gamma = step.gamma * kept.square().unsqueeze(-1) if step.by_sam else clipped
    return dataclasses.replace(step, gamma=gamma, sam_rate=step.sam_rate * kept)


def _sam_rate(state: SharpnessState | None, s: Tensor, gamma: Tensor) -> Tensor:
    if state is None or state.adaptive:
        return torch.zeros_like(s[:, 0])
    return sam_deviation_rate(s, gamma, state.rho, grad_norm=state.grad_norm)


def _das_rate(trainer: Trainer, optimizer: Optimizer, s: Tensor, gamma: Tensor, setting: Mapping[str, Any]) -> Tensor:
    rate = torch.zeros_like(s[:, 0])
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, DeviationAwareScaling):
            rate = rate + callback.deviation_rate(trainer, optimizer, s, gamma, setting)
    return rate


def _predicted_rate(step: _Step) -> Tensor:
    sgd, setting = isinstance(step.optimizer, SGD), step.setting
    rate = step.sam_rate
    if sgd and not setting["momentum"]:
        rate = rate + sam_deviation_rate(step.s, step.gamma, effective_rho(step.gamma, setting["lr"]))
    if sgd or setting.get("decoupled_weight_decay"):
        rate = rate - 4 * setting["weight_decay"] * norm_deviation(step.s)
    if sgd:  # what goes through the gradient, in the long run: momentum adds it up
        rate = rate * ((1 - setting["dampening"]) / (1 - setting["momentum"]) if setting["momentum"] else 1.0)
    return rate + step.das_rate


def _rows(step: _Step, after: Tensor) -> Tensor:
    """A column for each group: the quantities that are logged, then ``s̄²`` and ``Σ γ``, which the total needs.

    Args:
        step: With the gradients that the optimizer took.
        after: Squared norms of the cores after it, shape ``(G, K)``.
    """
    deviation, mean_square = norm_deviation(step.s), step.s.mean(-1).square()
    rows = (
        deviation,
        deviation / mean_square,
        norm_gradient_covariance(step.s, step.gamma),
        _predicted_rate(step),
        (norm_deviation(after) - deviation) / step.setting["lr"],
        effective_rho(step.gamma, step.setting["lr"]),
        mean_square,
        step.gamma.sum(-1),
    )
    return torch.stack([row.to(deviation) for row in rows])


def _total(table: Tensor, lr: float) -> Tensor:
    """The column of all groups together."""
    *_, mean_square, gamma = table.sum(1)
    total = table.sum(1)
    total[_QUANTITIES.index("normalized_deviation")] = total[0] / mean_square
    total[_QUANTITIES.index("effective_rho")] = gamma.sqrt() * (lr / 2)
    return total
