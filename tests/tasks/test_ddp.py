"""Two processes over gloo end where one process ends."""

import os
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule

from tenzoo.cli import main

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  callbacks:
    - class_path: tests.tasks.test_ddp.SaveWeights
      init_args: {path: WEIGHTS}
model:
  class_path: tenzoo.tasks.CompletionTask
  init_args:
    factorization: tt
    rank: 2
    reduction: sum
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.001}}
data:
  class_path: tenzoo.data.CompletionDataModule
  init_args: {dataset: il2, observed_fraction: 0.5, validation_fraction: 0, batch_size: 400, standardize: true}
"""


class SaveWeights(Callback):
    """Write what the first process ends with."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save({name: value.clone() for name, value in pl_module.state_dict().items()}, self.path)


class SaveEveryRank(Callback):
    """Write what every process ends with."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.network.state_dict(), f"{self.path}.{trainer.global_rank}")


class ImageBatches:
    """Another three batches for every process."""

    def __init__(self, rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        images = torch.randn(3, 4, 3, 32, 32, generator=generator)
        self.batches = [(batch, torch.randint(0, 10, (4,), generator=generator)) for batch in images]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class RandomImages(LightningDataModule):
    """In place of a data set that would have to be downloaded."""

    def train_dataloader(self):
        return ImageBatches(self.trainer.global_rank)


def run_two(words):
    command = [sys.executable, "-m", "tenzoo", *words, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(tmp_path, processes, *arguments):
    config, path = tmp_path / "config.yaml", tmp_path / f"{processes}.pt"
    config.write_text(CONFIG.replace("WEIGHTS", str(path)))
    words = ["fit", "--config", str(config), *arguments]
    if processes == 1:
        assert main(words) == 0
    else:
        run_two(words)
    return torch.load(path, weights_only=True)


METHODS = {
    "plain": [],
    "das": ["--trainer.callbacks+=DeviationAwareScaling", "--trainer.callbacks.alpha=0.05"],
    "sam": ["--model.init_args.sam.rho=0.05"],
    "accumulating": ["--model.init_args.sam.rho=0.05", "--model.init_args.accumulate_grad_batches=2"],
}


def compare(tmp_path, method):
    one, two = (weights(tmp_path, processes, *METHODS[method]) for processes in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


def test_sam_climbs_by_the_gradient_of_all_processes(tmp_path):
    compare(tmp_path, "sam")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "das", "accumulating"])
def test_two_processes_are_one(tmp_path, method):
    compare(tmp_path, method)


RING = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  callbacks:
    - class_path: tests.tasks.test_ddp.SaveEveryRank
      init_args: {path: WEIGHTS}
model:
  class_path: tenzoo.tasks.ImageClassificationTask
  init_args:
    network: {class_path: tenzoo.models.CIFARResNet, init_args: {depth: 20, factorization: tr, rank: 4}}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9, nesterov: true}}
data: {class_path: tests.tasks.test_ddp.RandomImages}
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "das", "sam"])
def test_both_processes_end_with_the_same_network(tmp_path, method):
    config = tmp_path / "config.yaml"
    config.write_text(RING.replace("WEIGHTS", str(tmp_path / "weights")))
    run_two(["fit", "--config", str(config), *METHODS[method]])
    first, second = (torch.load(tmp_path / f"weights.{rank}", weights_only=True) for rank in (0, 1))
    parameters = [name for name in first if "running" not in name]  # each process averages its own batches
    assert len(parameters) > 100
    for name in parameters:
        assert first[name].equal(second[name]), name


@pytest.mark.slow
def test_without_sync_each_process_climbs_by_its_own_batch(tmp_path):
    synced = weights(tmp_path, 2, *METHODS["sam"])
    alone = weights(tmp_path, 2, *METHODS["sam"], "--model.init_args.sam.sync_ascent=false")
    assert any(not value.equal(synced[name]) for name, value in alone.items())
    for name, value in alone.items():
        torch.testing.assert_close(synced[name], value, rtol=0.1, atol=0.05)


@pytest.mark.slow
def test_a_static_graph_is_refused_beside_sam(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("WEIGHTS", str(tmp_path / "unused.pt")))
    strategy = ["--trainer.strategy=DDPStrategy", "--trainer.strategy.static_graph=true"]
    words = ["fit", "--config", str(config), "--trainer.devices=2", *strategy, *METHODS["sam"]]
    command = [sys.executable, "-m", "tenzoo", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert "expected static_graph=False in the DDP strategy beside `sam`" in done.stderr
