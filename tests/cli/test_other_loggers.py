"""Loggers of services, by one line of a config; the run has its folder all the same."""

import json

import pytest

from tests.cli.test_commands import config, run  # noqa: F401  (fixtures)
from tests.runs import the_run

MONITOR = "--trainer.callbacks+=tenzoo.callbacks.NormDynamicsMonitor"


def check_folder(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.csv", "metrics.json", "norm_dynamics.png"} <= names
    assert list((folder / "checkpoints").glob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own imports
def test_mlflow(config, tmp_path, monkeypatch):  # noqa: F811
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow or mlflow-skinny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = ["--trainer.logger=MLFlowLogger", f"--trainer.logger.tracking_uri=file:{tmp_path}/mlruns"]
    assert run("fit", config, *logger, MONITOR) == 0
    check_folder(the_run(config.parent / "runs"))
    client = mlflow.tracking.MlflowClient(f"file:{tmp_path}/mlruns")
    (experiment,) = [each for each in client.search_experiments() if each.name == "lightning_logs"]
    (sent,) = client.search_runs([experiment.experiment_id])
    final = json.loads((the_run(config.parent / "runs") / "metrics.json").read_text())["metrics"]
    assert sent.data.metrics["held_out/r2"] == pytest.approx(final["held_out/r2"])
    assert sent.data.params["rank"] == "2"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own imports
def test_wandb(config, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.chdir(tmp_path)
    logger = ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true", f"--trainer.logger.save_dir={tmp_path}"]
    assert run("fit", config, *logger, MONITOR) == 0
    check_folder(the_run(config.parent / "runs"))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
