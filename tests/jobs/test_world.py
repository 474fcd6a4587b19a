"""The number of processes that were started is the Trainer's."""

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment

from tenzoo.cli import main
from tests.jobs.test_signals import CONFIG
from tests.tasks.toy import Batches, Regression, trainer


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "torchrun"),
        ({"WORLD_SIZE": "3", "RANK": "1"}, "the cluster"),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
    ],
)
def test_processes_that_would_train_alone_are_refused(monkeypatch, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run = trainer(max_epochs=1, plugins=[LightningEnvironment()])  # as devices=auto on a CPU ends up
    with pytest.raises(ValueError, match=f"as many processes in the Trainer as {named} started, got 1 where .* is ."):
        run.fit(Regression(), Batches(), Batches(seed=9))
    assert run.global_step == 0


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "2"},  # what Lightning's own launcher leaves behind
        {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"},  # in an interactive job nothing was started
    ],
)
def test_one_process_is_fine(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run = trainer(max_epochs=1, plugins=[LightningEnvironment()])
    run.fit(Regression(), Batches(), Batches(seed=9))
    assert run.global_step == 4


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_strategies_that_keep_their_results_are_refused(tmp_path, capsys, strategy):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("ROOT", str(tmp_path / "runs")))
    words = ["fit", "--config", str(config), "--trainer.devices", "2", "--trainer.strategy", strategy]
    assert main(words) == 2
    assert "tenzoo: error: expected 'ddp' in `trainer.strategy`, got " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
