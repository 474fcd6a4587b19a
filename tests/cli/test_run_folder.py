"""The folder of a run: its name, and what is in it after the run went on, was judged, or moved."""

import csv
import fcntl
import os
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from tenzoo.callbacks import DeviationAwareScaling, Rebalance
from tenzoo.cli import main
from tenzoo.cli.log_folders import LogFolders, SameFolder
from tenzoo.cli.run_folders import checkpoint_of, config_of, name_of, run_of
from tenzoo.tasks import SAM
from tenzoo.zoo.catalog import find
from tests.cli.refused import refused
from tests.cli.test_commands import config as small_config
from tests.cli.test_commands import run
from tests.runs import runs, the_run

LONGER = "--trainer.max_epochs=4"
SAVERS = """
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: "batch={step}", every_n_train_steps: 1, save_top_k: -1, auto_insert_metric_name: false}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        filename: "validated={step}"
        save_on_train_epoch_end: false
        save_top_k: -1
        auto_insert_metric_name: false
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        filename: "end={step}"
        every_n_epochs: 2
        save_on_train_epoch_end: true
        save_top_k: -1
        auto_insert_metric_name: false
model:"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config whose runs have checkpoints of every step, of every validation and of every epoch's end."""
    path = small_config.__wrapped__(tmp_path_factory.mktemp("run"))
    path.write_text(path.read_text().replace("\nmodel:", SAVERS, 1))
    return path


@pytest.fixture(scope="module")
def whole(config):
    """The folder of a run of four epochs."""
    assert run("fit", config, LONGER) == 0
    return the_run(config.parent / "runs")


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of it, as if it had been moved."""
    return shutil.copytree(whole, tmp_path / "runs" / whole.parent.name / whole.name)


def rows(folder, name="metrics.csv"):
    """What was logged, by step and column."""
    with (folder / name).open() as file:
        return sorted(
            (int(row["step"]), tuple(sorted((key, value) for key, value in row.items() if value)))
            for row in csv.DictReader(file)
        )


# --- names ---


def methods(*names, sam=None, callbacks=()):
    configs = [str(find("covid_tucker")), *(str(find(name)) for name in names)]
    return name_of(configs, SimpleNamespace(sam=sam), callbacks, 3)


def test_a_name_says_what_the_run_does_whatever_the_files_are_called():
    assert methods() == "covid_tucker-plain-s3"
    assert methods("methods/sam", sam=SAM(rho=0.1)) == methods(sam=SAM(rho=0.1)) == "covid_tucker-sam-s3"
    assert methods("methods/sam") == "covid_tucker-plain-s3"  # it was switched off
    assert methods("methods/adam", sam=SAM(rho=0.1, adaptive=True)) == "covid_tucker-adam+asam-s3"
    das = DeviationAwareScaling(0.1, gauge_fixed=True)
    assert methods(callbacks=[das, Rebalance()]) == "covid_tucker-das_gauge_fixed+rebalance-s3"
    assert methods("schedules/short_cifar10") == "covid_tucker-short_cifar10-s3"


def test_a_name_is_one_part_of_a_path(tmp_path):
    odd = tmp_path / "my model: a-b.yaml"
    assert name_of([str(odd), str(tmp_path / "a-part.yaml")], None, [], True) == "my_model_a-b-a_part-unseeded"
    assert len(name_of([f"{'x' * 250}.yaml"] * 2 + [f"{'y' * 250}.yaml"], None, [], 1)) < 200


def test_a_config_that_a_run_saved_is_that_of_the_run(whole):
    assert config_of([str(whole / "config.yaml")]) == "config"
    assert config_of(["runs/a-b-sam-s1/2026-11-28_114503/config-1.yaml"]) == "a-b"
    assert config_of(["runs/mine/config.yaml"]) == "config"
    assert config_of([str(find("methods/das")), str(find("covid_tucker"))]) == "covid_tucker"


def test_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda text: "2026-11-28_114503")
    made = [
        LogFolders().new_run(tmp_path / "a-plain-s0", command=command) for command in ("fit", "fit", "test", "test")
    ]
    names = [{logger.version for logger in loggers} for loggers in made]
    stamp = "2026-11-28_114503"
    assert names == [{stamp}, {f"{stamp}-1"}, {f"{stamp}-test"}, {f"{stamp}-1-test"}]
    assert {path.name for path in (tmp_path / "a-plain-s0").iterdir()} == set.union(*names)


def test_all_processes_have_the_folder_of_the_first(tmp_path):
    logger = CSVLogger(tmp_path, name="a-plain-s0", version="2026-11-28_114504")
    trainer = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda value: "2026-11-28_114503"))
    SameFolder([logger]).setup(trainer, None, "fit")
    assert logger.log_dir == str(tmp_path / "a-plain-s0" / "2026-11-28_114503")


def test_best_and_last_are_of_the_config_that_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = ["a-b-plain-s0/2026", "a-sam-s0/2025", "a-sam-s0/2026", "old/version_3", "a/version_1"]
    for age, name in enumerate(folders):
        file = tmp_path / "runs" / name / "checkpoints" / "last.ckpt"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (1e9 - age, 1e9 - age))

    def newest(config, root="runs"):
        return checkpoint_of("last", root, config).removesuffix("/checkpoints/last.ckpt")

    assert newest("a") == "runs/a-sam-s0/2025"
    assert newest("a-b") == newest(None) == "runs/a-b-plain-s0/2026"
    assert newest("old") == "runs/old/version_3"
    with pytest.raises(FileNotFoundError, match="expected a run of 'b' in 'runs'"):
        newest("b")
    assert newest("b", "runs/old") == "runs/old/version_3"  # a folder that was chosen for it
    assert checkpoint_of("runs/a/version_1/last", "runs", "b") == "runs/a/version_1/checkpoints/last.ckpt"


# --- runs that go on ---


@pytest.mark.sampled(2)
@pytest.mark.parametrize("checkpoint", ["batch=4.ckpt", "batch=6.ckpt", "validated=6.ckpt", "end=6.ckpt", "last.ckpt"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_logs_go_on_as_if_the_run_had_not_stopped(config, whole, stopped, checkpoint):
    """Wherever in an epoch the checkpoint was written; what came after it is put aside."""
    before = {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    assert run("fit", config, LONGER, "--ckpt_path", str(stopped / "checkpoints" / checkpoint)) == 0
    assert runs(stopped.parents[1]) == [stopped]
    assert rows(stopped) == rows(whole)
    assert set(rows(stopped, "metrics-1.csv")) <= set(rows(whole))
    for name in ("config.yaml", "environment.json", "hparams.yaml"):
        assert (stopped / name).read_bytes() == before[name]
    assert not (stopped / "config-1.yaml").exists()
    events = EventAccumulator(str(stopped)).Reload()
    for name in ("train/loss", "val/r2"):
        steps = [event.step for event in events.Scalars(name)]
        assert steps == sorted(steps)
        assert steps[-1] <= 12


def test_another_config_is_saved_beside_the_first(config, stopped):
    first = (stopped / "config.yaml").read_bytes()
    resumed = ["--ckpt_path", f"{stopped}/last"]
    for _ in range(2):
        assert run("fit", config, "--trainer.max_epochs=5", *resumed) == 0
    assert (stopped / "config.yaml").read_bytes() == first
    assert "max_epochs: 5" in (stopped / "config-1.yaml").read_text()
    assert {path.name for path in stopped.glob("config*")} == {"config.yaml", "config-1.yaml"}


def test_a_moved_run_remembers_its_best_weights(config, whole, stopped, capsys):
    state = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    shutil.rmtree(whole.parent.parent / "elsewhere", ignore_errors=True)
    hidden = whole.rename(whole.parent.parent / "elsewhere")
    try:
        assert run("fit", config, "--trainer.max_epochs=5", "--ckpt_path", f"{stopped}/last") == 0
    finally:
        hidden.rename(whole)
    assert "since the run was resumed" not in capsys.readouterr().out
    now = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)
    key = next(name for name, each in state["callbacks"].items() if each.get("monitor"))
    then, later = state["callbacks"][key], now["callbacks"][key]
    assert later["dirpath"] == str(stopped / "checkpoints")
    assert later["best_model_score"] >= then["best_model_score"]
    assert not list(stopped.glob("checkpoints/last-v*"))


def test_a_run_that_has_not_ended_is_left_alone(config, stopped, tmp_path, capsys):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    lock = os.open(stopped, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        words = ["fit", "--config", str(config), LONGER, "--ckpt_path", f"{stopped}/last"]
        refused(capsys, tmp_path, words, ["`ckpt_path`", "in which a process trains"])
    finally:
        os.close(lock)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_checkpoint_outside_of_a_run_begins_a_new_folder(config, whole, tmp_path):
    copied = tmp_path / "checkpoints" / "last.ckpt"
    copied.parent.mkdir()
    shutil.copy(whole / "checkpoints" / "last.ckpt", copied)
    assert run_of(copied) is None
    words = ["--config", str(config), "--trainer.default_root_dir", str(tmp_path / "new"), "--ckpt_path", str(copied)]
    assert main(["fit", *words, "--trainer.max_epochs=5"]) == 0
    assert run_of(next((the_run(tmp_path / "new") / "checkpoints").iterdir())) == the_run(tmp_path / "new")


# --- TensorBoard ---


def test_judging_a_run_is_no_run_of_tensorboard(config, stopped):
    for command in ("validate", "test", "predict"):
        root = ["--trainer.default_root_dir", str(stopped.parents[1])]
        assert main([command, "--config", str(config), *root, "--ckpt_path", f"{stopped}/best"]) == 0
    assert {path.parent for path in stopped.parents[1].rglob("events.out*")} == {stopped}
    beside = [folder.name for folder in stopped.parent.iterdir() if folder != stopped]
    assert sorted(re.sub(r"^[\d_-]+(-1)?-", "", name) for name in beside) == ["predict", "test", "validate"]


def test_hyperparameters_are_shown_with_the_metrics_that_a_run_ends_with(whole):
    events = EventAccumulator(str(whole)).Reload()
    final = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"] if name.startswith("final/")}
    assert {"final/val/r2", "final/held_out/rmse"} <= set(final)
    metadata = events.summary_metadata
    experiment = plugin_data_pb2.HParamsPluginData.FromString(
        metadata["_hparams_/experiment"].plugin_data.content
    ).experiment
    assert {info.name.tag for info in experiment.metric_infos} == set(final)
    start = plugin_data_pb2.HParamsPluginData.FromString(
        metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert start.hparams["rank"].number_value == 2
    assert "hp_metric" not in events.Tags()["scalars"]
