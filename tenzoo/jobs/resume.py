"""Exact resuming of a run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from tenzoo.dynamics import of_parts, own_part
from tenzoo.jobs.epoch_metrics import epoch_metrics, set_epoch_metrics, updates
from tenzoo.jobs.places import Place, continue_from, model_checkpoints, place_of, place_of_counters, window_is_open
from tenzoo.jobs.random_state import random_state, set_random_state
from tenzoo.jobs.slurm import check_same_job, slurm_job

_KEY = "tenzoo_resume"


class ExactResume(Callback):
    """Lets a resumed run end with the same bits as a run that was not stopped.

    Lightning's checkpoints hold weights, optimizers, schedulers, callbacks and the position in the data. This callback
    adds the rest: random states and, within an accumulation window, gradients, of every process; the averages of the
    running epoch; the last metrics, on which schedulers and checkpoints depend; the last file and the best score of
    each checkpoint callback, also if the resumed run has another folder. The run continues exactly where it stopped:
    a checkpoint is written in the middle of a step or an epoch, before its validation, the steps of its schedulers and
    its counters, and Lightning would skip these or count them twice.

    Every task attaches it. It works with any LightningModule. The module's own hook ``on_train_batch_end``, which runs
    after the checkpoint is written there, is not repeated.
    """

    def __init__(self) -> None:
        self._validated = False
        self._begun = False
        self._before_validation: tuple[dict[str, Any], dict[str, int]] | None = None
        self._resumed: dict[str, Any] | None = None
        self.keeps_best = True
        """Whether the checkpoint callbacks continue from the best scores of the resumed run."""

    # --- where the run is --------------------------------------------------------------------------------------

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begun = True

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = False
        # An interrupted validation is repeated with the same random numbers.
        self._before_validation = random_state(trainer.strategy.root_device), updates(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def _place(self, trainer: Trainer) -> Place:
        place = place_of(trainer)
        if trainer.sanity_checking or (place == "before a batch" and not self._begun):
            return "between epochs"  # the counters are still those of the previous epoch
        return "validated" if trainer.validating and self._validated else place

    # --- saving ------------------------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        place = self._place(trainer)
        # No collectives during an exception: the other processes may be anywhere.
        metrics = trainer._logger_connector._callback_metrics if trainer.interrupted else trainer.callback_metrics
        checkpoint[_KEY] = {
            "place": place,
            "job": slurm_job(),
            "processes": self._of_all_processes(trainer, self._of_this_process(trainer, pl_module, place)),
            "metrics": {name: value.detach().cpu() for name, value in metrics.items()},
            "saved": {each.state_key: _saving(each) for each in model_checkpoints(trainer)},
            "should_stop": bool(trainer.should_stop),
        }

    def _of_this_process(self, trainer: Trainer, pl_module: LightningModule, place: Place) -> dict[str, Any]:
        random, before = random_state(trainer.strategy.root_device), dict[str, int]()
        if place == "after a batch" and trainer.validating and self._before_validation is not None:
            random, before = self._before_validation
        gradients: dict[str, Tensor] = {}
        if window_is_open(trainer, place):
            named = pl_module.named_parameters()
            gradients = {name: own_part(each.grad.detach()).cpu() for name, each in named if each.grad is not None}
        return {"random": random, "gradients": gradients, "epoch": epoch_metrics(trainer, pl_module, before=before)}

    @staticmethod
    def _of_all_processes(trainer: Trainer, own: dict[str, Any]) -> list[dict[str, Any]]:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or trainer.world_size == 1 or trainer.interrupted:
            return [own]
        gathered: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
        torch.distributed.gather_object(own, gathered)
        return gathered or [own]

    # --- loading -----------------------------------------------------------------------------------------------

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING or "loops" not in checkpoint:
            return
        check_same_job(trainer, checkpoint.get(_KEY, {}))
        loops = checkpoint["loops"]["fit_loop"]
        self._resumed = {"place": place_of_counters(loops), **checkpoint.get(_KEY, {}), "loops": loops}
        states = [(each, checkpoint["callbacks"].get(each.state_key)) for each in model_checkpoints(trainer)]
        kept = [_keep_best(each, state, trainer.ckpt_path) for each, state in states if state is not None]
        self.keeps_best = all(kept)
        fit_loop = trainer.fit_loop
        # Lightning has no hook between its last preparation and the first epoch. This replaces one call.
        fit_loop.on_run_start = lambda: self._continue(trainer, pl_module)  # type: ignore[method-assign]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ends_a_step(trainer):
            # A run that stopped after its last step still has to validate and end its epoch, which Lightning skips.
            trainer.fit_loop.epoch_loop.max_steps += 1

    def _ends_a_step(self, trainer: Trainer) -> bool:
        return (
            self._resumed is not None
            and self._resumed["place"] in ("after a batch", "validated")
            and trainer.max_steps != -1
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._resumed = None
        if "on_run_start" in vars(trainer.fit_loop):
            del trainer.fit_loop.on_run_start

    def _continue(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop, resumed = trainer.fit_loop, self._resumed
        assert resumed is not None
        del loop.on_run_start
        if self._ends_a_step(trainer):
            loop.epoch_loop.max_steps -= 1
        loop.on_run_start()
        writer = _restore_saving(trainer, resumed.get("saved", {}))
        self._restore_process(trainer, pl_module, resumed)
        trainer._logger_connector._callback_metrics.update(
            {name: value.to(trainer.strategy.root_device) for name, value in resumed.get("metrics", {}).items()}
        )
        trainer.should_stop = resumed.get("should_stop", False)
        self._begun = True
        continue_from(trainer, resumed["place"], resumed["loops"], later=model_checkpoints(trainer)[writer + 1 :])
        self._resumed = None

    @staticmethod
    def _restore_process(trainer: Trainer, pl_module: LightningModule, resumed: Mapping[str, Any]) -> None:
        processes = resumed.get("processes", [])
        if len(processes) != trainer.world_size:
            return  # the checkpoint has an older version, or another number of processes
        own = processes[trainer.global_rank]
        for name, parameter in pl_module.named_parameters():
            if name in own["gradients"]:
                parameter.grad = of_parts(own["gradients"][name].to(parameter.device), parameter)
        set_epoch_metrics(trainer, pl_module, own["epoch"])
        set_random_state(own["random"], trainer.strategy.root_device)


# --- checkpoint callbacks --------------------------------------------------------------------------------------


def _saving(callback: ModelCheckpoint) -> dict[str, Any]:
    """The part of a callback's state that Lightning does not save."""
    return {
        "step": callback._last_global_step_saved,
        "path": str(callback._last_checkpoint_saved),
        "deferred": callback._defer_save_until_validation,
    }


def _restore_saving(trainer: Trainer, saved: Mapping[str, Mapping[str, Any]]) -> int:
    """Restore what the callbacks saved last.

    Returns:
        The index of the callback that wrote the checkpoint, or -1. Callbacks after it were not called in this step.
    """
    writer = -1
    for index, callback in enumerate(model_checkpoints(trainer)):
        if callback.state_key in saved:
            state = saved[callback.state_key]
            callback._last_global_step_saved = state["step"]
            callback._last_checkpoint_saved = state["path"]
            callback._defer_save_until_validation = state["deferred"]
        if _wrote(callback, trainer.ckpt_path):
            callback._last_global_step_saved = trainer.global_step
            callback._last_checkpoint_saved = str(trainer.ckpt_path)
            writer = index
    return writer


def _wrote(callback: ModelCheckpoint, path: Any) -> bool:
    own = [callback.last_model_path, callback.best_model_path, *callback.best_k_models]
    return path is not None and os.path.realpath(path) in {os.path.realpath(each) for each in own if each}


def _keep_best(callback: ModelCheckpoint, state: dict[str, Any], checkpoint: Any) -> bool:
    """Let a callback with a new folder continue from the scores in the old one, whose files are not removed.

    Lightning drops the scores if the folder has changed. This does so only if a file is missing, here and beside the
    checkpoint, where all of them are if the folder was moved, or is called by another path.
    """
    if checkpoint is not None:
        beside = Path(checkpoint).parent
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[name] = _moved(state.get(name, ""), beside)
        state["best_k_models"] = {_moved(path, beside): score for path, score in state.get("best_k_models", {}).items()}
    if all(Path(path).is_file() for path in state.get("best_k_models", {})):
        state["dirpath"] = callback.dirpath
    return bool(state["dirpath"] == callback.dirpath)


def _moved(path: str, folder: Path) -> str:
    """The file of this name in a folder, if it is the same, or the other is gone."""
    here = folder / Path(path).name
    if not path or not here.is_file() or (Path(path).is_file() and not here.samefile(path)):
        return path
    return str(here)


def first_logged_step(checkpoint: Mapping[str, Any]) -> int:
    """The first step of which a run that goes on from a checkpoint logs everything.

    Of the step before, which Lightning counts after its validation, some may have been logged, and some not.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None:
        return int(checkpoint["global_step"])
    place = checkpoint.get(_KEY, {}).get("place", place_of_counters(loops))
    counted = int(loops["epoch_loop.state_dict"].get("_batches_that_stepped", 0))
    return counted + (place in ("after a batch", "validated"))
