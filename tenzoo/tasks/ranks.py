"""Metrics that are logged in each of several processes, and must hold for all of them."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from tenzoo.distributed import shared_out

_MEANS = ("training_step", "validation_step", "test_step")


def logged_names(monitored: Iterable[object]) -> frozenset[str]:
    """The names under which monitored metrics are logged. A monitored name may add the loader, ``_step`` or ``_epoch``.

    Example:
        >>> sorted(logged_names(["val/loss/dataloader_idx_1", "train/loss_epoch", None]))
        ['train/loss', 'train/loss_epoch', 'val/loss', 'val/loss/dataloader_idx_1']
    """
    names: set[str] = set()
    for name in monitored:
        if isinstance(name, str):
            plain = name.split("/dataloader_idx_")[0]
            names |= {name, plain, plain.removesuffix("_step"), plain.removesuffix("_epoch")}
    return frozenset(names)


def as_of_all_ranks(module: LightningModule, value: Any, settings: dict[str, Any], *, monitored: bool) -> Any:
    """Prepare a value and the arguments of ``log``, so that a metric holds for all ranks.

    A monitored metric is reduced, unless the caller says otherwise: if each rank followed its own value, ranks would
    stop, step their schedulers and choose checkpoints at different times. A metric over an epoch of validation or test
    is reduced too: a rank knows its share of the data, and that of rank 0 would be logged. A mean over an epoch counts
    every item of all ranks once: Lightning divides by the mean size of the ranks' data, rounded down unless sizes are
    floats.

    Args:
        module: The module that logs, with a trainer of several processes.
        value: The value.
        settings: The other arguments of ``log``. Missing ones are added.
        monitored: Whether a callback or scheduler follows this metric.

    Returns:
        The value, on the device of the module if it will be reduced.
    """
    if isinstance(value, Metric):  # reduces itself
        return value
    judged = module.trainer.evaluating and settings.get("on_epoch") is not False
    if (monitored or judged) and not settings.get("rank_zero_only"):
        settings.setdefault("sync_dist", True)
    if not settings.get("sync_dist"):
        return value
    if _is_mean(module, settings):
        size = settings.get("batch_size") or _size_of_batch(module)
        settings["batch_size"] = None if size is None else float(size)
    return value.to(module.device) if isinstance(value, Tensor) else value


def _is_mean(module: LightningModule, settings: dict[str, Any]) -> bool:
    hook = module._current_fx_name
    on_epoch = settings.get("on_epoch")
    if on_epoch is None:
        on_epoch = hook != "training_step"
    return hook in _MEANS and bool(on_epoch) and settings.get("reduce_fx", "mean") == "mean"


def _size_of_batch(module: LightningModule) -> int | None:
    results = module.trainer._results
    if results is None or results.batch is None:
        return None
    if results.batch_size is None:
        results.batch_size = extract_batch_size(results.batch)
    return results.batch_size


def warn_of_repeats(loaders: Any) -> None:
    """Warn if a DistributedSampler repeats items: the metrics then differ from those of one process."""
    for sampler in map(shared_out, tree_leaves(loaders)):
        repeated = 0 if sampler is None else sampler.total_size - len(sampler.dataset)  # type: ignore[arg-type]
        if repeated > 0:
            rank_zero_warn(
                f"{repeated} of the items are judged twice: a DistributedSampler gives each process equally many; "
                "judge in one process, or give every process all items with Trainer(use_distributed_sampler=False)"
            )
