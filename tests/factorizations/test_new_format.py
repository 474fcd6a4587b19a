"""A new format is its legs: this file adds one, and it works wherever a format does, without a line elsewhere."""

import copy
from pathlib import Path
from typing import final

import pytest
import torch
from lightning import Trainer
from torch import nn

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor
from tenzoo.compression import apply_, export, plan
from tenzoo.data import CompletionDataModule
from tenzoo.factorizations import FACTORIZATIONS, Factorization
from tenzoo.models import CIFARResNet
from tenzoo.tasks import SAM, CompletionTask, ImageClassificationTask

EINSUM = "ar,rbs,sct,td->abcd"


@pytest.fixture(autouse=True)
def ht4():
    """The format of CONTRIBUTING.md."""

    @final
    class HierarchicalTucker(Factorization):
        name = "ht4"

        @staticmethod
        def legs(order):
            return [("a", "b"), ("a", "c", "d"), ("b", "e", "f"), (0, "c"), (1, "d"), (2, "e"), (3, "f")]

    yield HierarchicalTucker
    del FACTORIZATIONS["ht4"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("format", ["ht4", EINSUM])
@pytest.mark.parametrize("method", ["plain", "DAS", "SAM"])
def test_it_completes_a_tensor_as_well_as_cp(format, method, tmp_path):
    torch.manual_seed(0)
    shape = (12, 8, 6, 10)
    torch.save(FACTORIZATIONS["cp"](shape, 2).reconstruct().detach(), tmp_path / "tensor.pt")
    held_out = {}
    for factorization, rank in ((format, 3), ("cp", 3)):
        data = CompletionDataModule(
            str(tmp_path / "tensor.pt"), observed_fraction=0.4, standardize=True, steps_per_epoch=40
        )
        optimizer = lambda parameters: torch.optim.Adam(parameters, lr=0.03)  # noqa: E731
        task = CompletionTask(
            factorization, rank, init_std=0.5, optimizer=optimizer, sam=SAM(rho=0.01) if method == "SAM" else None
        )
        scaling = [DeviationAwareScaling(alpha=0.1)] if method == "DAS" else []
        trainer = Trainer(
            max_epochs=15,
            accelerator="cpu",
            callbacks=[NormDynamicsMonitor(), *scaling],
            default_root_dir=tmp_path / factorization[:2],
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        trainer.fit(task, data)
        held_out[factorization] = trainer.test(task, data, verbose=False)[0]["held_out/r2"]
    assert held_out[format] > 0.9 * held_out["cp"] > 0.5


@pytest.mark.parametrize("format", ["ht4", EINSUM])
def test_it_serves_a_resnet(format):
    network = CIFARResNet(20, factorization=format, rank=4)
    assert all(layer.factorization.name == format for name, layer in network.named_modules() if "conv" in name[-5:])
    task = ImageClassificationTask(network, sam=SAM(rho=0.05))
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(task.core_groups()) == 19
    assert all(core.grad is not None for group in task.core_groups() for core in group.cores)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("format", ["ht4", EINSUM])
@pytest.mark.parametrize("factors", [False, True])
def test_it_is_planned_decomposed_and_exported(format, factors, tmp_path):
    pytest.importorskip("onnxruntime", reason="ONNX needs pip install 'tenzoo[export]'")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 10))
    x = torch.randn(2, 8, 6, 6)
    made = plan(model, factorization=format, budget=0.6)
    assert made.parameters <= 0.6 * made.dense_parameters
    assert {layer.factorization for layer in made.layers} >= {format}
    small = apply_(copy.deepcopy(model), made, example_input=x)
    full = plan(model, factorization=format, budget=0.999)
    assert sum(layer.error for layer in full.layers) < sum(layer.error for layer in made.layers)
    export(small, Path(tmp_path) / "model.onnx", x, factors=factors)
