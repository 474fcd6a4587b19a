"""The command line in two processes ends where it ends in one."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from tenzoo.cli import main
from tests.processes import in_processes
from tests.runs import runs, the_run

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  precision: 64-true
  max_epochs: 2
  log_every_n_steps: 5
  default_root_dir: ROOT
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  callbacks:
    - class_path: tests.tasks.test_ddp.Outcome
      init_args: {path: OUTCOME}
model:
  class_path: tenzoo.tasks.CompletionTask
  init_args:
    factorization: tt
    rank: 2
    reduction: sum
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.001}}
data:
  class_path: tenzoo.data.CompletionDataModule
  init_args:
    dataset: synthetic
    shape: [6, 7, 8]
    num_entries: 301
    observed_fraction: 0.6
    validation_fraction: 0.1
    batch_size: 37
    standardize: true
"""


class Outcome(Callback):
    """Write the weights and metrics that every rank ends with, after fit, validation and test."""

    def __init__(self, path: str) -> None:
        self.path = path

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        weights = {name: value.clone() for name, value in pl_module.named_parameters()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        outcome = {"weights": {name: value.detach() for name, value in weights.items()}, "metrics": metrics}
        torch.save(outcome, f"{self.path}.{trainer.state.fn.value}.{trainer.global_rank}")


class OwnRate(Callback):
    """Gives rank 1 another learning rate."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            trainer.optimizers[0].param_groups[0]["lr"] *= 1.01


def written(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(CONFIG.replace("OUTCOME", str(folder / "outcome")).replace("ROOT", str(folder / "runs")))
    return config


def outcome(folder: Path, stage: str, rank: int = 0) -> Any:
    return torch.load(folder / f"outcome.{stage}.{rank}", weights_only=True)


def words_in(words: list[str]) -> tuple[int, str, str]:
    """Run the program; its exit code, and what it wrote."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(words)
    return code, out.getvalue(), errors.getvalue()


def compare(one: Path, two: Path, stages: list[str]) -> None:
    for stage in stages:
        expected = outcome(one, stage)
        for rank in (0, 1):
            found = outcome(two, stage, rank)
            assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6), stage
            for name, value in expected["weights"].items():
                torch.testing.assert_close(found["weights"][name], value, rtol=1e-9, atol=1e-12)
        assert outcome(two, stage, 0)["metrics"] == outcome(two, stage, 1)["metrics"]


METHODS = {
    "plain": [],
    "das": ["--trainer.callbacks+=DeviationAwareScaling", "--trainer.callbacks.alpha=0.05"],
    "sam": ["--model.init_args.sam.rho=0.05"],
    "accumulating": ["--model.init_args.sam.rho=0.05", "--model.init_args.accumulate_grad_batches=2"],
}
IN_TWO = ["--trainer.strategy=ddp", "--trainer.devices=2"]


def test_fit_validate_test_and_predict_give_what_one_process_gives(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert words_in(["fit", "--config", str(written(one)), *METHODS["sam"]])[0] == 0
    config = str(written(two))
    for code, _, errors in in_processes(words_in, ["fit", "--config", config, *METHODS["sam"], *IN_TWO]):
        assert (code, errors) == (0, "")
    compare(one, two, ["fit"])
    (checkpoint,) = map(str, (the_run(two / "runs") / "checkpoints").glob("*.ckpt"))
    for command in ("validate", "test", "predict"):
        rest = [*METHODS["sam"], "--ckpt_path", checkpoint, f"--trainer.default_root_dir={tmp_path / command}"]
        code, _, errors = words_in([command, "--config", str(one / "config.yaml"), *rest])
        assert (code, errors) == (0, "")
        for code, _, errors in in_processes(words_in, [command, "--config", config, *rest, *IN_TWO]):
            assert (code, errors) == (0, "")
    compare(one, two, ["validate", "test"])
    made = [folder / "completed.npz" for folder in runs(tmp_path / "predict")]
    assert len(made) == 2
    with np.load(made[0]) as first, np.load(made[1]) as second:
        for name in ("indices", "values"):
            np.testing.assert_array_equal(first[name], second[name])


def test_a_run_whose_ranks_part_ends_in_one_line(tmp_path):
    config = written(tmp_path)
    part = ["--trainer.callbacks+=tests.tasks.test_ddp.OwnRate"]
    (code, _, errors), (other, _, nothing) = in_processes(words_in, ["fit", "--config", str(config), *part, *IN_TWO])
    assert code == other == 1
    assert errors.startswith(
        "tenzoo: error: expected the same weights on all 2 ranks, got different ones in 'model.tensor."
    )
    assert errors.count("\n") == 1
    assert nothing == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--trainer.strategy=DDPStrategy", "--trainer.strategy.static_graph=true", *METHODS["sam"]],
            "expected static_graph=False in the DDP strategy with `sam`, got True",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_in_one_line(tmp_path, words, message):
    fit = ["fit", "--config", str(written(tmp_path)), "--trainer.devices=2", *words]
    for code, _, errors in in_processes(words_in, fit):
        assert code == 2
        assert message in errors
        assert errors.count("\n") == 1


# --- as it is started ------------------------------------------------------------------------------------------------


def started(command: list[str]) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_program_starts_its_second_process(tmp_path, method):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["fit", "--config", str(written(one)), *METHODS[method]]) == 0
    started(["-m", "tenzoo", "fit", "--config", str(written(two)), *METHODS[method], *IN_TWO])
    compare(one, two, ["fit"])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_torchrun_starts_both(tmp_path, method):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["fit", "--config", str(written(one)), *METHODS[method]]) == 0
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "tenzoo"]
    started([*launch, "fit", "--config", str(written(two)), *METHODS[method], *IN_TWO])
    compare(one, two, ["fit"])
