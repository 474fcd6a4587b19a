"""Runs of whole programs that are killed or asked to stop, in one process and in two."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from tenzoo.cli import main
from tenzoo.jobs.random_state import random_state
from tests.tasks.test_resume_chains import SaveEverywhere, assert_equal

pytestmark = pytest.mark.slow

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_epochs: 3
  default_root_dir: ROOT
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
  callbacks:
    - {class_path: tests.jobs.test_processes.Everywhere, init_args: {folder: ROOT}}
    - {class_path: tests.jobs.test_processes.Remember, init_args: {path: ROOT/state}}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: ROOT/checkpoints, save_last: true, every_n_train_steps: 1, save_top_k: 1, filename: newest}
model:
  class_path: tests.tasks.test_resume_chains.Noisy
  init_args:
    factorization: tt
    rank: 2
    accumulate_grad_batches: 2
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01, momentum: 0.9}}
    lr_scheduler: {class_path: torch.optim.lr_scheduler.ReduceLROnPlateau, init_args: {factor: 0.7, patience: 0}}
    lr_scheduler_monitor: noise
data:
  class_path: tenzoo.data.CompletionDataModule
  init_args: {dataset: il2, observed_fraction: 0.5, validation_fraction: 0.1, batch_size: 500, standardize: true}
"""

METHODS = {
    "momentum": [],
    "adam": ["--model.init_args.optimizer=Adam"],
    "sam": ["--model.init_args.sam.rho=0.1"],
    "das": ["--trainer.callbacks+=DeviationAwareScaling", "--trainer.callbacks.alpha=0.05"],
}


class Everywhere(SaveEverywhere):
    """Writes a checkpoint at every place."""

    def __init__(self, folder: str) -> None:
        super().__init__(Path(folder) / "places")


class Remember(Callback):
    """Writes all that a process ends with."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module):
        state = {
            "weights": pl_module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "metrics": dict(trainer.callback_metrics),
            "random": random_state(torch.device("cpu")),
            "counters": (trainer.global_step, trainer.current_epoch, trainer.fit_loop.epoch_loop._batches_that_stepped),
        }
        torch.save(state, f"{self.path}.{trainer.global_rank}")


class Misfortune(Callback):
    """Sends a signal to one process, or to all, at a place that is easy to break.

    Args:
        number: Of the signal.
        step: At which it is sent.
        ranks: Of the processes that get it.
        where: ``"step"``, or ``"save"``, while a checkpoint is being written.
    """

    def __init__(self, number: int, step: int, ranks: list[int], where: str = "step") -> None:
        self.number, self.step, self.ranks, self.where = number, step, ranks, where

    def _strike(self, trainer, where):
        if trainer.global_step == self.step and trainer.global_rank in self.ranks and self.where == where:
            self.step = -1
            os.kill(os.getpid(), self.number)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._strike(trainer, "step")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self._strike(trainer, "save")


class Program:
    """A program of one or two processes in a folder of its own."""

    def __init__(self, folder, words, *, processes=1, torchrun=False):
        folder.mkdir(exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(CONFIG.replace("ROOT", str(folder)))
        self.folder, self.processes = folder, processes
        words = ["fit", "--config", str(config), *words]
        if processes > 1:
            words += ["--trainer.devices", str(processes), "--trainer.strategy", "ddp"]
        start = [sys.executable, "-m"]
        if torchrun:
            start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        self._process = subprocess.Popen(
            [*start, "tenzoo", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def end(self, timeout=240):
        """Wait for the program; nothing of it is left behind.

        Returns:
            Its code, and what it printed.
        """
        try:
            printed, _ = self._process.communicate(timeout=timeout)
        finally:
            self.kill()
        return self._process.returncode, printed

    def kill(self):
        """As a machine that goes away."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def states(self):
        return [torch.load(self.folder / f"state.{rank}", weights_only=True) for rank in range(self.processes)]


def completed(program):
    code, printed = program.end()
    assert code == 0, printed[-3000:]
    return program.states()


def misfortune(number, step, ranks, where="step"):
    name = "--trainer.callbacks"
    return [
        f"{name}+=tests.jobs.test_processes.Misfortune",
        f"{name}.number={int(number)}",
        f"{name}.step={step}",
        f"{name}.ranks={ranks}",
        f"{name}.where={where}",
    ]


@pytest.mark.parametrize(("method", "processes"), [("momentum", 1), *[(method, 2) for method in METHODS]])
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path, method, processes):
    """From a checkpoint in a window of accumulation, after a step within an epoch, and at an epoch's end."""
    words = METHODS[method]
    whole = completed(Program(tmp_path / "whole", words, processes=processes))
    broken = Program(tmp_path / "broken", [*words, *misfortune(signal.SIGKILL, 7, [0])], processes=processes)
    code, _ = broken.end()
    assert code == -signal.SIGKILL
    for place in ("05-1-1batch", "06-1-1batch", "09-1-3epoch"):
        start = tmp_path / "broken" / "places" / f"{place}.ckpt"
        rest = Program(tmp_path / place, [*words, "--ckpt_path", str(start)], processes=processes)
        assert_equal(whole, completed(rest), f"{method} {place}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What two processes end with that nobody asked to stop."""
    return completed(Program(tmp_path_factory.mktemp("whole"), METHODS["sam"], processes=2))


@pytest.mark.parametrize(
    ("ranks", "where", "torchrun"),
    [([0], "step", False), ([1], "step", False), ([0, 1], "save", False), ([1], "save", True)],
)
def test_two_processes_stop_together(tmp_path, whole, ranks, where, torchrun):
    """Whichever is asked, and whatever it is doing; resumed, they end as if nothing had happened."""
    asked = misfortune(signal.SIGTERM, 4, ranks, where)
    program = Program(tmp_path / "asked", [*METHODS["sam"], *asked], processes=2, torchrun=torchrun)
    code, printed = program.end()
    assert code == (1 if torchrun else 143), printed[-3000:]  # torchrun has a code of its own
    (said,) = [line for line in printed.splitlines() if "tenzoo: SIGTERM after step " in line]
    saved = tmp_path / "asked" / "checkpoints" / "preempted.ckpt"
    assert f": saved {saved}; " in said
    rest = Program(tmp_path / "rest", [*METHODS["sam"], "--ckpt_path", str(saved)], processes=2, torchrun=torchrun)
    assert_equal(whole, completed(rest))


def test_processes_of_torchrun_do_not_train_alone(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("ROOT", str(tmp_path)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*start, "tenzoo", "fit", "--config", str(config)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 1
    assert "tenzoo: error: expected as many processes in the Trainer as torchrun started, got 1" in done.stderr
    assert not (tmp_path / "places").exists()


class SlowDisk(Callback):
    """Lets each checkpoint take its time."""

    def setup(self, trainer, pl_module, stage):
        sync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(0.15), sync(descriptor))


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_killed_at_random_it_always_goes_on_from_a_whole_checkpoint(tmp_path):
    """50 times, at least 15 times during a save: this run spends half of its time in writing checkpoints."""
    generator, kills, during_save = random.Random(0), 0, 0
    config, last = tmp_path / "config.yaml", tmp_path / "checkpoints" / "last.ckpt"
    config.write_text(CONFIG.replace("ROOT", str(tmp_path)))
    words = ["fit", "--config", str(config), "--trainer.max_epochs", "4"]
    assert main(words) == 0
    whole = torch.load(tmp_path / "state.0", weights_only=True)
    shutil.rmtree(last.parent)
    slow = [*words, "--trainer.callbacks+=tests.jobs.test_processes.SlowDisk"]

    def unfinished():
        return set(tmp_path.glob("*/.tmp-*"))

    while kills < 50:
        resume, before = ["--ckpt_path", str(last)] if last.exists() else [], unfinished()
        life = multiprocessing.get_context("fork").Process(target=main, args=([*slow, *resume],))
        life.start()
        while life.is_alive() and not unfinished() - before:
            time.sleep(0.01)
        life.join(generator.uniform(0, 0.8))
        life.kill()
        life.join()
        if life.exitcode == 0:  # it came to its end: from the start again
            assert_equal(whole, torch.load(tmp_path / "state.0", weights_only=True))
            shutil.rmtree(last.parent)
            continue
        assert life.exitcode == -signal.SIGKILL
        kills += 1
        during_save += bool(unfinished() - before)
    print(f"{kills} kills, {during_save} of them during a save")
    assert during_save >= 15
    assert main([*words, "--ckpt_path", str(last)] if last.exists() else words) == 0
    assert_equal(whole, torch.load(tmp_path / "state.0", weights_only=True))
    assert not unfinished()
