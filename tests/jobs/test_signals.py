"""A run that is asked to stop saves where a batch ends, says where, and exits with the signal's code."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from tenzoo.cli import main
from tenzoo.jobs import Preempted
from tests.runs import runs
from tests.tasks import test_resume_chains as chains
from tests.tasks.toy import Batches, Regression, assert_same_weights, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


class Send(Callback):
    """Sends a signal to this process in one of its hooks, once."""

    def __init__(self, hook: str, step: int = 4, number: int = int(signal.SIGTERM)) -> None:
        self.sent = False

        def once(trainer, *_):
            if not self.sent and trainer.global_step >= step and not trainer.sanity_checking:
                self.sent = True
                send(number)

        setattr(self, hook, once)


HOOKS = [
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",  # DAS has scaled the cores
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_save_checkpoint",
    "on_train_epoch_end",
]


@pytest.mark.parametrize(
    ("name", "hook"),
    [("das", "on_before_optimizer_step"), ("adam", "on_validation_batch_start"), ("momentum", "on_save_checkpoint")]
    + [pytest.param(name, hook, marks=pytest.mark.slow) for name in ("sam", "das", "momentum") for hook in HOOKS],
)
def test_a_run_goes_on_after_sigterm_as_if_nothing_had_happened(tmp_path, capsys, name, hook):
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    whole = chains.run(tmp_path / "0", name)
    with pytest.raises(Preempted) as caught:
        chains.run(tmp_path / "1", name, extra=[Send(hook)])
    assert caught.value.code == 143
    saved = tmp_path / "1" / "preempted.ckpt"
    step = torch.load(saved, weights_only=True)["global_step"]
    assert (
        f"tenzoo: SIGTERM after step {step}: saved {saved}; give it as `ckpt_path` to continue"
        in capsys.readouterr().err
    )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # the handlers are as they were
    (tmp_path / "2").mkdir()
    rest = chains.run(tmp_path / "2", name, saved)
    assert rest[1].seen == whole[1].seen[len(whole[1].seen) - len(rest[1].seen) :]
    chains.assert_equal(chains.outcome(*whole[:2]), chains.outcome(*rest[:2]), hook)


def test_the_perturbed_weights_of_sam_are_never_saved(tmp_path):
    class Asked(chains.Noisy):
        def loss(self, batch, batch_idx):
            if self.perturbed and self.trainer.global_step == 4:
                send()
            return super().loss(batch, batch_idx)

    whole = chains.run(tmp_path / "0", "sam")
    with pytest.raises(Preempted):
        chains.run(tmp_path / "1", "sam", kind=Asked)
    rest = chains.run(tmp_path / "2", "sam", tmp_path / "1" / "preempted.ckpt")
    chains.assert_equal(chains.outcome(*whole[:2]), chains.outcome(*rest[:2]))


def test_without_checkpoints_nothing_is_saved(tmp_path, capsys):
    run = trainer(tmp_path, callbacks=[Send("on_train_batch_end")])
    with pytest.raises(Preempted):
        run.fit(Regression(), Batches(), Batches(seed=9))
    assert "nothing was saved, since checkpoints are switched off" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_handler_of_the_user_is_called_too(tmp_path):
    called = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append(1))
    try:
        with pytest.raises(Preempted):
            trainer(tmp_path, callbacks=[Send("on_train_batch_end")]).fit(Regression(), Batches(), Batches(seed=9))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == [1]


# --- from the command line, and under Slurm --------------------------------------------------------------------

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_epochs: 3
  default_root_dir: ROOT
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  callbacks:
    - class_path: tests.jobs.test_signals.Hooked
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {save_last: true}
model:
  class_path: tenzoo.tasks.CompletionTask
  init_args:
    factorization: tt
    rank: 2
    sam: {rho: 0.1}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01, momentum: 0.9}}
data:
  class_path: tenzoo.data.CompletionDataModule
  init_args: {dataset: il2, observed_fraction: 0.5, batch_size: 500, standardize: true}
"""


class Hooked(Callback):
    """Does in a step what a test wants, and keeps the last weights."""

    asked = staticmethod(lambda trainer: None)
    weights: torch.Tensor

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        type(self).asked(trainer)

    def on_train_end(self, trainer, pl_module):
        parameters = [parameter.detach().flatten() for parameter in pl_module.parameters()]
        type(self).weights = torch.cat(parameters).clone()


@pytest.fixture
def fit(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("ROOT", str(tmp_path / "runs")))

    def fit(*words, signal_at=None, number=signal.SIGUSR1):
        monkeypatch.setattr(Hooked, "asked", lambda trainer: trainer.global_step == signal_at and send(number))
        return main(["fit", "--config", str(config), *words])

    return fit


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A job of one task, and a scontrol that notes what it is asked."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in {
        "NTASKS": 1,
        "NTASKS_PER_NODE": 1,
        "PROCID": 0,
        "LOCALID": 0,
        "NODEID": 0,
        "JOB_ID": 17,
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    return lambda: (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""


def test_sigterm_from_the_command_line(tmp_path, fit, capsys):
    assert fit(signal_at=4, number=signal.SIGTERM) == 143
    saved = runs(tmp_path / "runs")[0] / "checkpoints" / "preempted.ckpt"
    assert f"tenzoo: SIGTERM after step 5: saved {saved}" in capsys.readouterr().err
    assert fit("--ckpt_path", str(saved)) == 0
    resumed = Hooked.weights
    assert fit() == 0
    assert Hooked.weights.equal(resumed)


def test_a_requeued_job_goes_on_and_a_later_one_begins_anew(tmp_path, fit, slurm, capsys, monkeypatch):
    assert fit(signal_at=4) == 138
    assert slurm() == "requeue 17\n"
    assert "tenzoo: SIGUSR1 after step 5: saved " in capsys.readouterr().err
    assert (
        fit("--model.init_args.optimizer.init_args.lr", "0.02") == 2
    )  # a requeued job is checked like any resumed one
    assert "lr" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert fit() == 0
    whole = Hooked.weights
    assert "goes on" not in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert fit() == 0
    assert "tenzoo: job 17 was requeued and goes on from " in capsys.readouterr().err
    assert Hooked.weights.equal(whole)
    assert fit(signal_at=None) == 0  # it is done: started once more, it begins anew
    assert "goes on" not in capsys.readouterr().err


def test_a_checkpoint_of_lightnings_requeue_is_nobodys(tmp_path, fit, slurm, capsys):
    """It would be resumed by any run, and judged in place of the run's own weights."""
    assert fit("--trainer.max_epochs", "1") == 0
    table = capsys.readouterr().out
    last = runs(tmp_path / "runs")[0] / "checkpoints" / "last.ckpt"
    assert fit("--model.init_args.rank", "3") == 0  # a stale one of another model
    other = runs(tmp_path / "runs")[1] / "checkpoints" / "last.ckpt"
    assert last.exists()
    (tmp_path / "runs" / "hpc_ckpt_1.ckpt").write_bytes(other.read_bytes())
    capsys.readouterr()
    assert fit("--trainer.max_epochs", "1") == 0
    assert capsys.readouterr().out.replace(runs(tmp_path / "runs")[2].name, runs(tmp_path / "runs")[0].name) == table


def test_a_requeue_that_fails_is_said(fit, slurm, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert fit(signal_at=4) == 138
    assert "job 17 was not requeued: " in capsys.readouterr().err


def test_in_python_a_job_is_saved_where_lightning_looks(tmp_path, slurm):
    callbacks = [ModelCheckpoint(tmp_path / "checkpoints"), Send("on_before_optimizer_step", 4, signal.SIGUSR1)]
    run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(Preempted):
        run.fit(Regression(), Batches(), Batches(seed=9))
    assert slurm() == "requeue 17\n"
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()


def test_in_python_a_job_resumes_its_own_checkpoint_alone(tmp_path, slurm, monkeypatch):
    def fit(*callbacks):
        torch.manual_seed(0)
        task = Regression()
        savers = [ModelCheckpoint(tmp_path / "checkpoints", save_top_k=0), *callbacks]
        run = trainer(tmp_path, callbacks=savers, enable_checkpointing=True)
        run.fit(task, Batches(count=1), Batches(seed=9))
        return run, task

    _, whole = fit()
    with pytest.raises(Preempted):
        fit(Send("on_before_optimizer_step", 2, signal.SIGUSR1))
    run, resumed = fit()
    assert_same_weights(whole, resumed)
    (validated,) = run.validate(resumed, Batches(seed=9), verbose=False)  # not those of the requeue
    (expected,) = trainer().validate(whole, Batches(seed=9), verbose=False, ckpt_path=None)
    assert validated == expected
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(
        ValueError, match=r"expected a checkpoint of this Slurm job, 18, got '.*hpc_ckpt_1.*' of job 17"
    ):
        fit()


def test_what_cannot_be_saved_dies_of_sigterm_as_any_program(tmp_path):
    """While it evaluates there is nothing to save, and nobody would stop it later."""
    code = (
        "import os, signal, warnings\n"
        "from lightning.pytorch import Callback\n"
        "from tests.tasks.toy import Batches, Regression, trainer\n"
        "class Ask(Callback):\n"
        "    def on_validation_batch_end(self, *_): os.kill(os.getpid(), signal.SIGTERM)\n"
        "trainer(callbacks=[Ask()]).validate(Regression(), Batches())\n"
        "print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGTERM
    assert "went on" not in done.stdout
