"""A checkpoint of the state in which training ends."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from tenzoo.jobs.places import model_checkpoints


class SaveLastState(Callback):
    """Saves the state in which training ends, through every checkpoint callback that keeps the latest state.

    Lightning's ``ModelCheckpoint`` saves after a validation, or after every n-th epoch or step. A run that ends between
    two of them leaves an older state, or none. Callbacks that keep several states, or the best by a metric, do not
    save. If the run saved nothing at all, its last state becomes ``last.ckpt`` in the folder of the first callback.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop

        def end() -> None:
            _save(trainer)
            type(loop).on_run_end(loop)

        # Before any callback's on_train_end, where some replace the weights by averages.
        loop.on_run_end = end  # type: ignore[method-assign]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(trainer.fit_loop).pop("on_run_end", None)


def _save(trainer: Trainer) -> None:
    savers = [each for each in model_checkpoints(trainer) if each.save_top_k != 0 or each.save_last]
    for each in savers:
        if not each._should_skip_saving_checkpoint(trainer):
            candidates = each._monitor_candidates(trainer)
            if each.monitor is None and each.save_top_k == 1:
                each._save_topk_checkpoint(trainer, candidates)
            each._save_last_checkpoint(trainer, candidates)
    if savers and not trainer.fast_dev_run and not any(each._last_checkpoint_saved for each in savers):  # type: ignore[attr-defined]
        first = savers[0]
        first.save_last = True
        first._save_last_checkpoint(trainer, first._monitor_candidates(trainer))
        first.save_last = None
        rank_zero_warn(
            f"training ended before any checkpoint callback saved; the last state is in {first.last_model_path}"
        )
