"""Training batches shared out among processes: the average of their gradients is the gradient of one process."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from tenzoo.data import CIFAR10DataModule, CompletionDataModule
from tenzoo.data.images import cifar10_files
from tenzoo.data.loader import Share
from tenzoo.tasks import CompletionTask, DistillationTask, ImageClassificationTask
from tenzoo.training import batch_weight
from tests.processes import in_processes

CPU = torch.device("cpu")


def trainer_of(data, rank, world_size):
    """What tasks, data modules and loaders ask of a Trainer."""
    progress = SimpleNamespace(ready=0, processed=0)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=progress)))
    precision = SimpleNamespace(convert_input=lambda images: images.double())
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        datamodule=data,
        fit_loop=loop,
        precision_plugin=precision,
        strategy=SimpleNamespace(root_device=CPU),
    )


def gradients(task, make_data, world_size, batches):
    """Of each batch: the gradient that each rank has, averaged as DDP does, and the loss likewise."""
    averaged = [
        [torch.zeros_like(p) for p in task.parameters()] + [torch.zeros((), dtype=torch.float64)]
        for _ in range(batches)
    ]
    for rank in range(world_size):
        data = make_data()
        data.trainer = task.trainer = trainer_of(data, rank, world_size)
        data.setup()
        for number, batch in zip(range(batches), data.train_dataloader(), strict=True):
            assert isinstance(batch, Share) == (world_size > 1)
            moved = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, CPU, 0), 0)
            task.zero_grad()
            loss = task.loss(moved, number)
            loss.backward()
            for total, value in zip(averaged[number], [*(p.grad for p in task.parameters()), loss], strict=True):
                total += value.detach() / world_size
    return averaged


def compare(task, make_data, world_size, batches):
    task.double()
    one = gradients(task, make_data, 1, batches)
    several = gradients(task, make_data, world_size, batches)
    for expected, actual in zip(one, several, strict=True):
        assert any(value.abs().max() > 1e-6 for value in expected)
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("batch_size", [None, 40, 44, 90])
def test_a_completion_has_the_gradient_of_one_process(reduction, world_size, batch_size):
    def data():
        return CompletionDataModule(
            "synthetic", shape=[6, 7, 8], num_entries=190, observed_fraction=0.5, validation_fraction=0.05,
            batch_size=batch_size,
        )  # fmt: skip

    count = 90  # of entries to train on: batches of 90, 40 + 40 + 10, 44 + 44 + 2
    batches = {None: 1, 40: 3, 44: 3, 90: 1}[batch_size]
    first = data()
    first.setup()
    assert len(first.splits["train"]) == count
    torch.manual_seed(0)
    compare(CompletionTask("tt", 2, shape=[6, 7, 8], reduction=reduction), data, world_size, batches)


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 10),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["hard", "smoothed", "distilled"])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_images_have_the_gradient_of_one_process(root, kind, world_size):
    torch.manual_seed(0)
    smoothing = 0.0 if kind == "hard" else 0.1
    if kind == "distilled":
        task = DistillationTask(small_network(), teacher=small_network(), label_smoothing=smoothing)
    else:
        task = ImageClassificationTask(small_network(), label_smoothing=smoothing)
    # 93 images in batches of 15: six of them, then one of 3
    compare(task, lambda: CIFAR10DataModule(root, validation_size=7, batch_size=15, seed=9), world_size, 7)


def test_an_item_that_another_process_has_too_is_not_in_the_accuracy(root):
    data = CIFAR10DataModule(root, validation_size=7, batch_size=93)
    task = ImageClassificationTask(small_network())
    data.trainer = task.trainer = trainer_of(data, 95, 96)
    data.setup()
    task.double()
    (share,) = data.train_dataloader()
    assert share.weight == 0
    moved = data.on_after_batch_transfer(data.transfer_batch_to_device(share, CPU, 0), 0)
    loss = task.loss(moved, 0)
    assert loss == 0
    accuracy = task._epoch_means["train/accuracy"]  # that it is there at all matters: its mean is one of all processes
    assert accuracy.state(SimpleNamespace(world_size=1)).tolist() == [[0, 0]]


def test_the_weight_is_of_the_batch_at_hand():
    data = CompletionDataModule("synthetic", shape=[6, 7, 8], num_entries=190, observed_fraction=0.5)
    task = CompletionTask("cp", 2, shape=[6, 7, 8])
    assert batch_weight(task) == 1
    data.trainer = task.trainer = trainer_of(data, 0, 2)
    data.setup()
    (share,) = data.train_dataloader()
    assert len(share.batch.value) == 43  # of 85
    data.transfer_batch_to_device(share, CPU, 0)
    assert batch_weight(task) == pytest.approx(86 / 85)
    data.transfer_batch_to_device(next(iter(data.val_dataloader()[0])), CPU, 0)
    assert batch_weight(task) == 1


def train_on_single_images(root, digests):
    """Two batches of one image each, in however many processes: all but the first have none of their own."""
    cifar10_files.SHA1 = digests
    torch.manual_seed(0)
    task = ImageClassificationTask(small_network(), optimizer=partial(torch.optim.SGD, lr=0.1))
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    several = {"strategy": "ddp", "devices": 2} if "WORLD_SIZE" in os.environ else {}
    short = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0}
    trainer = Trainer(accelerator="cpu", precision="64-true", **short, **quiet, **several)
    trainer.fit(task, CIFAR10DataModule(root, validation_size=7, batch_size=1))
    return [p.detach() for p in task.parameters()], trainer.callback_metrics["train/accuracy"]


def test_fewer_items_than_processes_are_trained_on_once(root):
    weights, accuracy = train_on_single_images(root, cifar10_files.SHA1)
    for others, other_accuracy in in_processes(train_on_single_images, root, cifar10_files.SHA1):
        assert other_accuracy == accuracy
        for expected, actual in zip(weights, others, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
