"""A task of a user's that says nothing of its settings to Lightning."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from tenzoo.data import CompletionBatch
from tenzoo.prediction import CompletedEntriesWriter
from tenzoo.tasks import Task


class OwnTask(Task):
    """Rates every entry by its place in the first mode.

    Args:
        start: Of all ratings.
        **kwargs: Of :class:`~tenzoo.tasks.Task`.
    """

    def __init__(self, start: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ratings = nn.Embedding(6, 1)
        nn.init.constant_(self.ratings.weight, start)

    def error(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean squared one."""
        index, values = batch
        return (self.ratings(index[:, 0]).squeeze(1) - values).square().mean()

    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Of a batch."""
        return self.error(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the error of the first loader under the name that the config watches."""
        if dataloader_idx == 0:
            self.log("val/r2", -self.error(batch), add_dataloader_idx=False)


class PartlySaved(OwnTask):
    """Saves one of its settings."""

    def __init__(self, start: float = 0.0, **kwargs: Any) -> None:
        super().__init__(start, **kwargs)
        self.save_hyperparameters("start")


class Renamed(OwnTask):
    """Another one."""


class Answering(OwnTask):
    """Answers what the command line asks."""

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> CompletionBatch:
        """Rate each entry."""
        return CompletionBatch(batch[0], self.ratings(batch[0][:, 0]).squeeze(1))

    def prediction_writer(self) -> CompletedEntriesWriter:
        """A file of another name."""
        return CompletedEntriesWriter("rated.csv")

    def final_evaluations(self) -> tuple[Any, ...]:
        """None."""
        return ()

    def described_network(self, data: LightningDataModule) -> nn.Module:
        """Two convolutions."""
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3))

    def example_input(self, data: LightningDataModule) -> Tensor | None:
        """Images of two channels."""
        return torch.empty(5, 2, 9, 7, device="meta")
