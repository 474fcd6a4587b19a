"""Two processes over gloo end where one process ends."""

import os
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback

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


def weights(tmp_path, processes, *arguments):
    config, path = tmp_path / "config.yaml", tmp_path / f"{processes}.pt"
    config.write_text(CONFIG.replace("WEIGHTS", str(path)))
    words = ["fit", "--config", str(config), "--trainer.devices", str(processes), *arguments]
    if processes == 1:
        assert main(words) == 0
    else:
        command = [sys.executable, "-m", "tenzoo", *words, "--trainer.strategy", "ddp"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
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
