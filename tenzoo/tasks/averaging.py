"""Averages of the weights of a task."""

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel


def keep_integers(trainer: Trainer) -> None:
    """Copy the integer buffers of a model into its averages.

    torch averages all buffers alike, and rounds a mean of integers down: the index 384, averaged with itself, becomes
    383.

    Args:
        trainer: The Trainer, with its callbacks set up.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            _keep_integers(callback._average_model)


def _keep_integers(averaged: AveragedModel) -> None:
    update = averaged.update_parameters

    @torch.no_grad()
    def update_parameters(model: nn.Module) -> None:
        update(model)
        for mean, own in zip(averaged.module.buffers(), model.buffers(), strict=True):
            if not (mean.is_floating_point() or mean.is_complex()):
                mean.copy_(own)

    averaged.update_parameters = update_parameters  # type: ignore[method-assign]
