"""The metrics of a running epoch, as tensors and builtins."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torchmetrics import Metric

_PLAIN = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)


def updates(module: LightningModule) -> dict[str, int]:
    """The number of updates of each metric object of a module."""
    return {name: metric._update_count for name, metric in _metrics_of(module)}


def epoch_metrics(trainer: Trainer, module: LightningModule, *, before: Mapping[str, int]) -> dict[str, Any]:
    """The sums of the epoch's averages: of values logged during training, and of the module's metric objects.

    Args:
        trainer: The Trainer, in training.
        module: The module with the metric objects.
        before: Updates before a validation that will be repeated. Metrics that it updated are left out.
    """
    results = trainer.fit_loop.epoch_loop._results
    return {
        "processes": _processes(trainer),
        "logged": {key: _logged(metric) for key, metric in results.items() if not metric.has_reset},
        "objects": {
            name: {
                "updates": metric._update_count,
                "states": {key: _to(getattr(metric, key), torch.device("cpu")) for key in metric._defaults},
            }
            for name, metric in _metrics_of(module)
            if metric._update_count > 0 and before.get(name, metric._update_count) == metric._update_count
        },
    }


def set_epoch_metrics(trainer: Trainer, module: LightningModule, state: dict[str, Any]) -> None:
    """Continue the epoch's averages from saved sums, unless the number of processes has changed."""
    device = trainer.strategy.root_device
    for name, metric in _metrics_of(module):
        if name in state["objects"]:
            saved = state["objects"][name]
            metric._update_count, metric._computed = saved["updates"], None
            for key, value in saved["states"].items():
                setattr(metric, key, _to(value, device))
    results = trainer.fit_loop.epoch_loop._results
    logged = state["logged"] if state.get("processes", _processes(trainer)) == _processes(trainer) else {}
    for key, saved in logged.items():
        results[key] = _result(trainer, module, saved).to(device)
    trainer._logger_connector._first_loop_iter = True  # the next batch is not the first: sums are not reset


def _processes(trainer: Trainer) -> int | None:
    """The number of processes; None without a strategy for several, with which logged values differ even for one."""
    return trainer.world_size if trainer._accelerator_connector.is_distributed else None


def _metrics_of(module: LightningModule) -> list[tuple[str, Metric]]:
    return [(name, each) for name, each in module.named_modules() if isinstance(each, Metric)]


def _to(value: Any, device: torch.device) -> Any:
    return [each.to(device) for each in value] if isinstance(value, list) else value.to(device)


def _logged(metric: _ResultMetric) -> dict[str, Any]:
    sums = ("value", "cumulated_batch_size") if metric.is_tensor else ()
    last = metric._forward_cache
    return {
        "meta": {name: getattr(metric.meta, name) for name in _PLAIN},
        "reduce": metric.meta.reduce_fx.__name__,
        "sync": metric.meta.sync.should,
        "rank_zero_only": metric.meta.sync.rank_zero_only,
        "sums": {name: getattr(metric, name).cpu() for name in sums if hasattr(metric, name)},
        "last": None if last is None else last.cpu(),
    }


def _result(trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> _ResultMetric:
    # The same as LightningModule.log creates: it compares the next value of this name with it.
    meta = _Metadata(reduce_fx=getattr(torch, saved["reduce"]), **saved["meta"])
    reduce = trainer.strategy.reduce
    meta.sync = _Sync(_should=saved["sync"], fn=reduce, _group=None, rank_zero_only=saved["rank_zero_only"])
    metric = _ResultMetric(meta, bool(saved["sums"]))
    if not saved["sums"]:
        metric.value = module.get_submodule(meta.metric_attribute or "")
    for name, value in saved["sums"].items():
        setattr(metric, name, value)
    metric._forward_cache = saved["last"]
    metric._update_count = 1  # without an update, computing it warns
    return metric
