"""What callbacks that work on cores have in common: their core groups, and the rates that they predict."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from tenzoo.cores import CoreGroup, find_core_groups
from tenzoo.distributed import check_strategy
from tenzoo.training import settings_of


class CoreCallback(Callback):
    """A callback that reads or scales single cores. It refuses strategies that split them, and a second of its kind."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_strategy(trainer.strategy, type(self).__name__)
        alike = [each for each in trainer.callbacks if isinstance(each, type(self))]  # type: ignore[attr-defined]
        if len(alike) > 1:  # two would scale twice
            raise ValueError(
                f"expected one {type(self).__name__} in `trainer.callbacks`, got {len(alike)}; see whether a config is "
                "given twice, or two configs add it"
            )


@runtime_checkable
class PredictsDeviationRate(Protocol):
    """A callback that scales cores before a step, and predicts how fast this moves their Norm Deviation.

    :class:`~tenzoo.callbacks.NormDynamicsMonitor` asks every callback of the Trainer that has this method, and adds its
    rate to ``norms/…/predicted_rate``. No base class is needed.
    """

    def deviation_rate(
        self,
        trainer: Trainer,
        optimizer: Optimizer,
        squared_norms: Tensor,
        squared_grad_norms: Tensor,
        setting: Mapping[str, Any],
    ) -> Tensor:
        """``dQ/dt`` that the callback adds in the coming step: ΔQ divided by the learning rate.

        Args:
            trainer: The Trainer of the run.
            optimizer: The optimizer that is about to step.
            squared_norms: ``s`` of the trained cores of G groups with K cores each, shape ``(G, K)``.
            squared_grad_norms: ``γ`` of their gradients before clipping, shape ``(G, K)``.
            setting: Learning rate, momentum and the other settings of the optimizer for these cores.

        Returns:
            Shape ``(G,)``.
        """


def check_first_order(callback: Callback, trainer: Trainer) -> None:
    """Refuse LBFGS, which takes many steps in one.

    Raises:
        ValueError: If an optimizer is LBFGS.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise ValueError(f"expected a first-order optimizer for {type(callback).__name__}, got LBFGS")


def groups_for(callback: Callback, module: LightningModule) -> list[CoreGroup]:
    """The core groups of a module, for a callback that needs some.

    Raises:
        ValueError: If there are none.
    """
    groups = find_core_groups(module)
    if not groups:
        raise ValueError(
            f"expected a model with core groups for {type(callback).__name__}, found none in "
            f"{type(module).__name__}; train it without the callback, or register_core_groups() for its layers"
        )
    return groups


def trained_cores(group: CoreGroup, settings: Mapping[int, Any]) -> list[Tensor]:
    """The cores of a group that an optimizer moves, by its :func:`~tenzoo.training.settings_of`."""
    return [core for core in group.cores if core.requires_grad and id(core) in settings]


def check_owners(groups: Iterable[CoreGroup], optimizers: Sequence[Optimizer]) -> None:
    """Refuse groups whose trained cores are divided among optimizers.

    Raises:
        ValueError: For such a group, with its name.
    """
    if len(optimizers) < 2:
        return
    settings = [settings_of(optimizer) for optimizer in optimizers]
    for group in groups:
        parts = [part for each in settings if (part := set(map(id, trained_cores(group, each))))]
        if any(part != parts[0] for part in parts):
            raise ValueError(f"expected the cores of {group.name!r} in one optimizer, got them in {len(parts)}")
