"""Weights that a run starts from, that are judged, and that are saved with a card."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from tenzoo.cli import main
from tenzoo.cli.run_folders import checkpoint_of
from tenzoo.tasks import Task
from tenzoo.zoo import weights
from tenzoo.zoo.catalog import model_of
from tests.runs import runs, the_run

QUIET = [f"--trainer.{name}=false" for name in ("enable_progress_bar", "enable_model_summary")]
FIT = ["fit", "--config", "covid_tucker", *QUIET]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of two epochs, which every test gets a copy of."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*FIT, "--trainer.max_epochs=2"]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """The folder of a run of two epochs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return the_run(tmp_path / "runs")


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())["metrics"]


def test_a_run_notes_where_it_was_made_and_how_it_ended(run):
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert {"command", "tenzoo", "lightning", "python", "processor", "threads", "gpus"} <= set(environment)
    assert set(metrics(run)) == {f"{split}/{name}" for split in ("train", "val", "held_out") for name in ("r2", "rmse")}


def test_a_new_run_starts_from_a_checkpoint_with_other_settings(run, capsys):
    checkpoint = run / "checkpoints" / "last.ckpt"
    still = ["--trainer.max_epochs=1", "--model.init_args.optimizer.init_args.lr=0.0"]
    assert main([*FIT, *still, "--init_from", str(checkpoint)]) == 0
    again = runs(run.parent)[1]
    before, after = (Task.from_pretrained(folder / "checkpoints" / "last.ckpt") for folder in (run, again))
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    resumed = torch.load(again / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["epoch"] == 0
    assert resumed["global_step"] == 25
    # A run that goes on has begun with these weights, and does not begin with them again.
    config = ["fit", "--config", str(again / "config.yaml"), "--trainer.max_epochs=2", *QUIET]
    assert main([*config, "--ckpt_path", str(again / "checkpoints" / "last.ckpt")]) == 0
    capsys.readouterr()


def test_a_saved_model_is_judged_as_its_run_was(run, tmp_path, capsys):
    best = next((run / "checkpoints").glob("epoch=*.ckpt"))
    assert main(["save", "--ckpt_path", str(best), "--output", str(tmp_path / "model"), "--title", "Serology"]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "# Serology\n" in card
    assert "- **parameters:** 24,349, dense 28,908; tucker\n" in card
    for name, value in metrics(run).items():
        assert f"{value:.4f}" in card, name
    assert "| 50 |" in card
    capsys.readouterr()
    words = ["--config", "covid_tucker", *QUIET, "--pretrained", str(tmp_path / "model")]
    for command in ("test", "validate"):
        assert main([command, *words]) == 0
        table = capsys.readouterr().out
        assert str(tmp_path / "model") in "".join(table.split())
        assert all(f"{value:.4f}" in table for value in metrics(run).values())
    assert main(["predict", *words, "--trainer.logger=false"]) == 0


def test_checkpoints_by_what_they_are(run, tmp_path, capsys):
    root = str(run.parent)
    best = next((run / "checkpoints").glob("epoch=*.ckpt"))
    last = run / "checkpoints" / "last.ckpt"
    assert checkpoint_of("best", root) == str(best)
    assert checkpoint_of("last", root) == checkpoint_of(f"{run}/last", "nowhere") == str(last)
    capsys.readouterr()
    assert main(["test", "--config", "covid_tucker", *QUIET, "--ckpt_path", "best"]) == 0
    table = capsys.readouterr().out
    assert all(f"{value:.4f}" in table for value in metrics(run).values())
    assert main([*FIT, "--trainer.max_epochs=3", "--ckpt_path", "last"]) == 0
    assert checkpoint_of("last", root) == str(last)
    best = next((run / "checkpoints").glob("epoch=*.ckpt"))  # of the run that went on
    assert "epoch=2" in best.name
    moved = run.rename(tmp_path / "elsewhere")
    assert checkpoint_of(f"{moved}/best", root) == str(moved / "checkpoints" / best.name)
    (moved / "checkpoints" / best.name).unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        checkpoint_of(f"{moved}/best", root)
    with pytest.raises(FileNotFoundError, match="expected a run in 'nowhere' for `ckpt_path` 'last', got none"):
        checkpoint_of("last", "nowhere")
    with pytest.raises(FileNotFoundError, match="expected a run with checkpoints in `ckpt_path`"):
        checkpoint_of(f"{tmp_path}/last", root)


def test_a_card_has_no_metrics_of_another_checkpoint(run):
    judged = json.loads((run / "metrics.json").read_text())
    assert judged["checkpoint"] == next((run / "checkpoints").glob("epoch=*.ckpt")).name
    other = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(other | {"global_step": other["global_step"] - 1}, run / "checkpoints" / "other.ckpt")
    for name, is_judged in (("last", True), ("other", False)):
        path = run / "checkpoints" / f"{name}.ckpt"
        assert main(["save", "--ckpt_path", str(path), "--output", name]) == 0
        assert ("## Metrics" in Path(name, "README.md").read_text()) is is_judged


def test_weights_are_not_judged_on_other_data_without_a_word(run, tmp_path, capsys):
    assert main(["save", "--ckpt_path", "best", "--output", "model"]) == 0
    words = ["test", "--config", "covid_tucker", *QUIET, "--pretrained", "model"]
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert main(words) == 0
        assert not [each for each in told if "trained on" in str(each.message)]
        assert main([*words, "--data.init_args.seed=1"]) == 0
    (told_of,) = [str(each.message) for each in told if "trained on" in str(each.message)]
    assert "`seed`" in told_of


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["test", "--config", "covid_tucker"],
            "expected a checkpoint in `ckpt_path`, or `pretrained`, for test, got none",
        ),
        (["test", "--config", "covid_tucker", "--pretrained", "nowhere"], "got 'nowhere', which does not exist"),
        (["fit", "--config", "covid_tucker", "--init_from", "nowhere"], "in `init_from`, got 'nowhere'"),
        (["fit", "--config", "covid_tucker", "--init_from", ".", "--pretrained", "."], "got both, '.' and '.'"),
        (["fit", "--config", "covid_tucker", "--pretrained", "zoo:other"], "got 'other'"),
        (["fit", "--config", "covid_tucker_paper", "--pretrained"], "got 'covid_tucker_paper'"),
        (["save", "--ckpt_path", "nowhere", "--output", "x"], "in `ckpt_path`, got 'nowhere'"),
        (["save", "--ckpt_path", "x"], "expected `--output` for tenzoo save, got none"),
    ],
)
def test_what_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said in line
    assert not (tmp_path / "runs").exists()


def test_weights_of_another_model_are_refused(run, capsys):
    small = ["--model.init_args.rank=[2,2,2]", "--trainer.max_epochs=1"]
    assert main([*FIT, *small, "--init_from", str(run / "checkpoints" / "last.ckpt")]) == 2
    assert "expected the shape" in capsys.readouterr().err
    assert runs(run.parent) == [run]


# --- the weights of the package --------------------------------------------------------------------------------------


def test_names_of_models():
    assert model_of(["mine.yaml"]) is None


def test_weights_that_are_not_those_that_were_published(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"other")
    (tmp_path / "SHA256.json").write_text('{"a": "0"}')
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="as it was published, got another file; install again"):
        weights.folder_of("a")
