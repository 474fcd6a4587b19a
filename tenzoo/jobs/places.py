"""The places in Lightning's loops at which checkpoints are written, and how a run continues from each."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fit_loop import RestartStage
from lightning.pytorch.utilities import rank_zero_warn

Place: TypeAlias = Literal[
    "between epochs", "before a batch", "in a batch", "after a batch", "validated", "epoch's end"
]
"""«after a batch» is before its validation, and perhaps before its scheduler steps; «validated» is after it. At
the «epoch's end» the callbacks of the epoch run."""


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """The ``ModelCheckpoint`` callbacks of a Trainer, with subclasses."""
    return [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]


def place_of(trainer: Trainer) -> Place:
    """The place of a Trainer, by its counters, which do not tell whether a validation has ended."""
    loop = trainer.fit_loop
    place = place_of_counters(
        {
            "epoch_progress": loop.epoch_progress.state_dict(),
            "epoch_loop.batch_progress": loop.epoch_loop.batch_progress.state_dict(),
        }
    )
    return "after a batch" if trainer.validating and place == "before a batch" else place


def place_of_counters(loops: Mapping[str, Any]) -> Place:
    """The place of a run, by saved counters."""
    epoch, batch = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
    if epoch["ready"] == epoch["completed"] or epoch["ready"] > epoch["started"]:
        return "between epochs"
    if epoch["ready"] == epoch["processed"]:
        return "epoch's end"
    if batch["ready"] > batch["processed"]:
        return "in a batch"
    return "after a batch" if batch["completed"] < batch["processed"] else "before a batch"


def window_is_open(trainer: Trainer, place: Place) -> bool:
    """Whether gradients are accumulated and the optimizer has not stepped yet."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    trained: int = progress.current.processed  # type: ignore[attr-defined]
    last = progress.is_last_batch or trained >= trainer.num_training_batches
    if place == "between epochs" or (last and place != "in a batch"):
        return False
    return trained % trainer.accumulate_grad_batches != 0


def continue_from(
    trainer: Trainer, place: Place, loops: Mapping[str, Any], *, later: Sequence[ModelCheckpoint]
) -> None:
    """Finish the work of the place where the run stopped, and let Lightning continue from there.

    Args:
        trainer: The Trainer, before its first epoch.
        place: The place where the run stopped.
        loops: The counters of the run at this place.
        later: Checkpoint callbacks that were not called yet at this place.
    """
    loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    _load_counters(trainer, loops)
    epoch, batch = loop.epoch_progress, cast(Any, epoch_loop.batch_progress)
    if place == "epoch's end":
        _call(trainer, later, "on_train_epoch_end")
        _end_epoch(trainer)
        place = "between epochs"
    if place == "between epochs":
        _set_all_stages(epoch, to="completed")
        if batch.current.ready > 0 and not epoch_loop._num_ready_batches_reached():
            _reopen(epoch)  # max_steps had ended it: a longer run continues it
            _continue_epoch(trainer)
        return
    _set_all_stages(batch, to="processed")
    if place in ("after a batch", "validated"):
        if place == "after a batch":
            _call(trainer, later, "on_train_batch_end", None, None, epoch_loop.batch_idx)
        else:
            _call(trainer, later, "on_validation_end")
            epoch_loop._skip_next_val = True
        assert loop._data_fetcher is not None
        epoch_loop.on_advance_end(loop._data_fetcher)
        if epoch_loop.done:
            loop.on_advance_end()
            return
    _continue_epoch(trainer)


def _load_counters(trainer: Trainer, loops: Mapping[str, Any]) -> None:
    """Load the saved counters, without Lightning's changes for a restart."""
    loop = trainer.fit_loop
    epoch_loop = loop.epoch_loop
    loop.epoch_progress.load_state_dict(loops["epoch_progress"])
    epoch_loop.batch_progress.load_state_dict(loops["epoch_loop.batch_progress"])
    for each in (
        loop,
        epoch_loop,
        epoch_loop.automatic_optimization,
        epoch_loop.manual_optimization,
        epoch_loop.val_loop,
    ):
        each.on_iteration_done()


def _set_all_stages(progress: Any, *, to: str) -> None:
    """Set all stages of a counter to the value of one of them."""
    for counts in (progress.total, progress.current):
        counts.ready = counts.started = counts.processed = counts.completed = getattr(counts, to)


def _reopen(epoch: Any) -> None:
    """Let the last counted epoch run again."""
    for counts in (epoch.total, epoch.current):
        counts.processed -= 1
        counts.completed -= 1


def _end_epoch(trainer: Trainer) -> None:
    loop = trainer.fit_loop
    if loop.epoch_loop._num_ready_batches_reached():
        loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    trainer._logger_connector.reset_results()
    loop.epoch_progress.increment_completed()


def _continue_epoch(trainer: Trainer) -> None:
    """Continue an epoch in its middle: without the hooks of its start, with its iterator and its counters."""
    loop = trainer.fit_loop
    loop._restart_stage = RestartStage.RESTARTED_MID_EPOCH
    loop._resuming_from_checkpoint = True
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    if loop.epoch_loop.batch_idx >= 0 and not all(isinstance(loader, _Stateful) for loader in loaders):
        rank_zero_warn(
            "expected state_dict() and load_state_dict() of a data loader to resume within an epoch, got one without: "
            "the batches will differ from those of a run that was not stopped"
        )
    # The loop of the epoch would reset its counters. This replaces one call.
    loop.epoch_loop.reset = lambda: delattr(loop.epoch_loop, "reset")  # type: ignore[method-assign]


def _call(trainer: Trainer, callbacks: Sequence[ModelCheckpoint], hook: str, *args: Any) -> None:
    for callback in callbacks:
        getattr(callback, hook)(trainer, trainer.lightning_module, *args)
