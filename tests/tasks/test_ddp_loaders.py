"""Loaders that are shared out among processes, as Lightning does with those of torch."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tenzoo.callbacks import PredictedClassesWriter
from tenzoo.tasks import ImageClassificationTask
from tests.processes import in_processes
from tests.tasks.toy import Regression, sgd, trainer


class Own(LightningDataModule):
    """A user's images in torch's loaders."""

    def __init__(self, count: int, batch_size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self._data = TensorDataset(
            torch.randn(count, 3, 4, 4, generator=generator), torch.randint(0, 10, (count,), generator=generator)
        )
        self._size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(self._data, batch_size=self._size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def judged(count: int, batch_size: int) -> list[dict[str, float]]:
    torch.manual_seed(2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    task = ImageClassificationTask(network, optimizer=sgd(0.0))
    two = {"strategy": "ddp", "devices": 2} if torch.distributed.is_torchelastic_launched() else {}
    fit = trainer(max_epochs=1, **two)
    data = Own(count, batch_size)
    warnings.filterwarnings("ignore", message="Using `DistributedSampler` with the dataloaders")  # which is put right
    fit.fit(task, datamodule=data)
    found = [{name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("val")}]
    return found + [judge(task, datamodule=data, verbose=False)[0] for judge in (fit.validate, fit.test)]


# 13 in batches of 3: 7 and 6 items, one repeated in a batch of its own; 9 of 2: 5 and 4, within a batch.
@pytest.mark.sampled(2)
@pytest.mark.parametrize(("count", "batch_size"), [(13, 3), (9, 2), (12, 4), (2, 1)])
def test_each_image_is_judged_once(count, batch_size):
    expected = judged(count, batch_size)
    for found in in_processes(judged, count, batch_size):
        for one, two in zip(expected, found, strict=True):
            assert set(one) == set(two)
            assert len(one) == 2
            assert two == pytest.approx(one, rel=1e-6)


def predicted(folder: str) -> str:
    task = ImageClassificationTask(nn.Sequential(nn.Flatten(), nn.Linear(48, 10)))
    two: Any = {"strategy": "ddp", "devices": 2, "callbacks": [PredictedClassesWriter()]}
    with pytest.raises(ValueError, match="expected all data in every process") as caught:
        trainer(Path(folder), **two).predict(task, datamodule=Own(9, 2))
    trainer(Path(folder), **two, use_distributed_sampler=False).predict(task, datamodule=Own(9, 2))
    return str(caught.value)


def test_a_part_of_the_predictions_is_not_written_for_all_of_them(tmp_path):
    for message in in_processes(predicted, str(tmp_path)):
        assert "got a DataLoader that is divided among 2; set trainer.use_distributed_sampler: false" in message
    with np.load(tmp_path / "classes.npz") as written:
        assert len(written["classes"]) == 9


def warned() -> str:
    data = TensorDataset(torch.randn(9, 6), torch.randn(9, 3))
    fit = trainer(strategy="ddp", devices=2, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.fit(Regression(optimizer=sgd()), DataLoader(data, 2), DataLoader(data, 2))
    return "\n".join(str(each.message) for each in caught)


def test_items_that_count_twice_in_a_user_s_own_validation_are_told_of():
    first, second = in_processes(warned)
    assert "1 of the items are judged twice: a DistributedSampler gives each process equally many" in first
    assert "judged twice" not in second
