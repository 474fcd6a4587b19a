"""What only an accelerator would notice, seen on a stand-in."""

import functools

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor
from tenzoo.data import CompletionDataModule, Entries, EntryLoader
from tenzoo.factorizations import FACTORIZATIONS
from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedLinear
from tenzoo.models import CIFARResNet
from tenzoo.tasks import SAM, CompletionTask, ImageClassificationTask
from tests.accelerator import Calls, fake_cuda, steps_on_meta
from tests.factorizations.formats import NAMES

SHAPES = [(6, 5, 4, 8), (5, 4, 6, 7, 3, 2)]
EMBEDDINGS = [None, ((4, 4, 4), (2, 3)), ((1, 60), (3, 2)), ((60, 1), (1, 6))]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rank", [1, 20])
@pytest.mark.parametrize("name", NAMES)
def test_formats_make_no_batches_of_outer_products(name, rank):
    """Torch on CUDA computes those by Triton, which takes a C compiler at run time."""
    with fake_cuda() as device, Calls() as calls:
        for shape in SHAPES:
            weight = FACTORIZATIONS[name](shape, rank, device=device)
            weight.entries(torch.zeros(9, len(shape), dtype=torch.int64, device=device))
            weight.reconstruct()
    assert calls.seen
    assert calls.outer_products() == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rank", [1, 20])
@pytest.mark.parametrize("name", NAMES)
def test_layers_make_no_batches_of_outer_products(name, rank):
    with fake_cuda() as device, Calls() as calls:
        for implementation in ("contract", "reconstruct"):
            kind = {"factorization": name, "rank": rank, "implementation": implementation, "device": device}
            TensorizedLinear(24, 32, **kind)(torch.zeros(5, 3, 24, device=device))
            for channels, groups, kernel in ((8, 1, 3), (8, 2, 1), (8, 8, 3), (1, 1, 3)):
                layer = TensorizedConv2d(channels, 8, kernel, groups=groups, **kind)
                layer(torch.zeros(2, channels, 5, 5, device=device))
            for tensorization in EMBEDDINGS:
                layer = TensorizedEmbedding(60, 6, tensorization=tensorization, **kind)
                layer(torch.zeros(4, 3, dtype=torch.int64, device=device))
    assert calls.seen
    assert calls.outer_products() == []


METHODS = {
    "plain": (None, []),
    "sam": (SAM(), []),
    "asam": (SAM(adaptive=True), []),
    "sam of cores": (SAM(scope="cores"), []),
    "das": (None, [functools.partial(DeviationAwareScaling, 0.1)]),
    "das global": (None, [functools.partial(DeviationAwareScaling, 0.1, normalizer="global", gauge_fixed=True)]),
    "das with momentum": (None, [functools.partial(DeviationAwareScaling, 0.1, momentum_correction=True)]),
}
"""For each method its settings of SAM, and what makes its callbacks."""


class OnMeta(LightningDataModule):
    """Batches that lie on the meta device already."""

    def __init__(self, batches):
        super().__init__()
        self.batches = DataLoader(batches, batch_size=None)

    def train_dataloader(self):
        return self.batches

    def val_dataloader(self):
        return self.batches  # never asked for: Lightning warns where there are none


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_a_network_does_not_wait_for_the_device(method):
    sam, callbacks = METHODS[method]
    network = CIFARResNet(20, factorization="tr", rank=3)
    batch = torch.zeros(4, 3, 8, 8, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    task = ImageClassificationTask(network, optimizer=sgd, sam=sam)
    callbacks = [*(make() for make in callbacks), NormDynamicsMonitor()]
    calls = steps_on_meta(task, OnMeta([batch] * 6), callbacks)
    assert calls.uploads() == []
    assert len(calls.operations()) > 100


@pytest.mark.parametrize("method", ["plain", "sam", "das"])
@pytest.mark.parametrize("factorization", NAMES)
def test_a_step_of_completion_does_not_wait_for_the_device(factorization, method, monkeypatch):
    sam, callbacks = METHODS[method]
    meta = torch.device("meta")
    data = CompletionDataModule("synthetic", shape=(40, 30, 40, 30), num_entries=2000, batch_size=64)
    data.setup()
    train = data.splits["train"]
    loader = EntryLoader(Entries(train.index, train.value), batch_size=64, device=meta)
    monkeypatch.setattr(data, "_make_train_loader", lambda **process: loader)
    task = CompletionTask(factorization, 3, optimizer=sgd, sam=sam)
    callbacks = [*(make() for make in callbacks), NormDynamicsMonitor()]
    assert steps_on_meta(task, data, callbacks).uploads() == []


def test_waiting_for_the_device_is_noticed():
    class Waits(ImageClassificationTask):
        def loss(self, batch, batch_idx):
            loss = super().loss(batch, batch_idx)
            if batch_idx == 3:
                loss.item()
            return loss

    class Uploads(ImageClassificationTask):
        def loss(self, batch, batch_idx):
            logits = self(batch[0])[torch.arange(len(batch[1]))]
            weights = torch.tensor([0.5, 0.5], device=logits.device)
            return torch.nn.functional.cross_entropy(logits[[0, 1]], batch[1][:2]) * weights.sum()

    batch = torch.zeros(4, 3, 8, 8, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="item"):
        steps_on_meta(Waits(CIFARResNet(20), optimizer=sgd), OnMeta([batch] * 6))
    uploads = steps_on_meta(Uploads(CIFARResNet(20), optimizer=sgd), OnMeta([batch] * 6)).uploads()
    assert {name for name, *_ in uploads} >= {torch.ops.aten.index, torch.Tensor.__getitem__, torch.tensor}
