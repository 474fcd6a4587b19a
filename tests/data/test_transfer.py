from types import SimpleNamespace

import pytest
import torch

from tenzoo.data import CompletionDataModule, Entries, EntryLoader, ImageLoader, Images
from tenzoo.data.transfer import MAX_RESIDENT_BYTES, storage_device, upload
from tests.accelerator import Calls, fake_cuda

META = torch.device("meta")
"""In place of an accelerator: what is to be computed with it has to be there."""
COPY = torch.ops.aten._to_copy


def entries(count):
    return Entries(torch.randint(5, (count, 3)), torch.randn(count))


def images(count):
    return Images(torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8), torch.randint(10, (count,)))


def test_an_upload_is_pinned_and_not_waited_for(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    with fake_cuda() as device, Calls() as calls:
        there = upload(torch.zeros(3, 2), device)
        assert there.is_cuda
        assert upload(there, device) is there
    assert pinned == [(3, 2)]
    assert calls.uploads() == [(COPY, (3, 2), True)]


def test_nothing_is_copied_on_the_cpu():
    value = torch.randn(3)
    assert upload(value, torch.device("cpu")) is value


def test_small_data_lives_on_the_accelerator_and_large_data_does_not():
    largest = torch.empty(MAX_RESIDENT_BYTES, dtype=torch.uint8, device=META)
    cuda, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert storage_device((largest,), cuda) == cuda
    assert storage_device((largest, torch.zeros(1)), cuda) == cpu
    assert storage_device((torch.zeros(1),), cpu) == cpu


def test_data_modules_keep_their_training_data_with_the_trainer(monkeypatch):
    made = []
    monkeypatch.setattr(
        "tenzoo.data.completion.datamodule.EntryLoader", lambda *args, **kwargs: made.append(kwargs["device"])
    )
    data = CompletionDataModule("covid")
    data.setup()
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=device), global_rank=0, world_size=1)
        data.train_dataloader()
    data.trainer = None
    data.train_dataloader()
    assert made == [torch.device("cuda", 1), torch.device("cpu"), torch.device("cpu")]


@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_of_entries_are_drawn_without_the_host(world_size):
    place = {"world_size": world_size, "rank": world_size - 1}
    loader = EntryLoader(entries(70), batch_size=16, device=META, **place)
    same = EntryLoader(entries(70), batch_size=16, **place)
    next(iter(loader)), next(iter(same))
    with Calls() as calls:
        batches = list(zip(loader, same, strict=True))[:3]  # of the permutation that is there by now
    assert all(part.device == META for batch, _ in batches for part in _parts(batch, world_size))
    shapes = [[part.shape for part in _parts(pair[0], world_size)] for pair in batches]
    assert shapes == [[part.shape for part in _parts(pair[1], world_size)] for pair in batches]
    assert len(calls.uploads()) == 1  # the second permutation


@pytest.mark.parametrize("world_size", [1, 3])
def test_of_images_only_what_is_drawn_is_uploaded(world_size):
    loader = ImageLoader(images(70), batch_size=16, augment=True, device=META, world_size=world_size)
    next(iter(loader))
    with Calls() as calls:
        batch = _parts(next(iter(loader)), world_size)
    share = -(-16 // world_size)
    assert [tuple(part.shape) for part in batch] == [(share, 3, 8, 8), (share,), (share, 2), (share,)]
    assert all(part.device == META for part in batch)
    assert calls.uploads() == [(COPY, (share, 2), True), (COPY, (share,), True)]


def test_a_full_batch_is_uploaded_once():
    loader = EntryLoader(entries(7), steps_per_epoch=3, device=META)
    with Calls() as calls:
        first, second, _ = loader
    assert first.index is second.index
    assert calls.uploads() == []


def _parts(batch, world_size):
    return list(batch if world_size == 1 else batch.batch)
