"""Image classification from the command line."""

import math

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule

from tenzoo.cli import main
from tenzoo.models import CIFARResNet
from tenzoo.tasks import ImageClassificationTask
from tests.runs import runs
from tests.tasks.test_classification import Batches
from tests.tasks.toy import assert_same_weights


class Images(LightningDataModule):
    """Eight images of each kind."""

    def train_dataloader(self):
        return Batches(sizes=(4, 4))

    def val_dataloader(self):
        return Batches(seed=1, sizes=(4, 4))

    def test_dataloader(self):
        return Batches(seed=2, sizes=(4, 4))

    def predict_dataloader(self):
        return self.test_dataloader()


NETWORK = {"depth": 20, "num_classes": 5, "factorization": "cp", "rank": 2}


@pytest.fixture
def config(tmp_path):
    """A small run, of which the learning rates are logged."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": "end"}}
    rates = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}}
    settings = {
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 1, **quiet}
        | {"default_root_dir": str(tmp_path / "runs"), "callbacks": [saver, rates]},
        "model": {
            "class_path": "tenzoo.tasks.ImageClassificationTask",
            "init_args": {
                "network": {"class_path": "tenzoo.models.CIFARResNet", "init_args": NETWORK},
                "num_classes": 5,
                "optimizer": optimizer,
            },
        },
        "data": {"class_path": "tests.tasks.test_classification_cli.Images"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(command, config, *args):
    return main([command, "--config", str(config), *args])


LOADS = pytest.mark.filterwarnings("ignore:(?s).*JsonargparseDeprecationWarning")


@LOADS
def test_a_network_of_the_command_line_is_kept(config, capsys):
    schedule = ["--model.init_args.lr_scheduler", "cosine"]
    assert run("fit", config, *schedule) == 0
    directory = runs(config.parent / "runs")[0]
    checkpoint = directory / "checkpoints" / "end.ckpt"
    lines = (directory / "metrics.csv").read_text().splitlines()
    columns = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    rates = [float(row["lr-SGD/cores"]) for row in columns if row["lr-SGD/cores"]]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])
    stored = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert stored["network"]["init_args"].items() >= NETWORK.items()
    loaded = ImageClassificationTask.load_from_checkpoint(checkpoint, weights_only=True)
    assert loaded.network.conv1.factorization.shape == (16, 9, 3)
    other = CIFARResNet(20, num_classes=5, factorization="cp", rank=2)
    again = ImageClassificationTask.load_from_checkpoint(checkpoint, network=other, weights_only=True)
    assert again.network is other
    assert "network" not in again.hparams
    assert_same_weights(loaded, again)

    longer = ["--ckpt_path", str(checkpoint), "--trainer.max_epochs", "3"]
    assert run("fit", config, *schedule, *longer) == 0
    capsys.readouterr()
    assert run("fit", config, *schedule, *longer, "--model.init_args.network.init_args.rank", "3") == 2
    assert "network.init_args.rank` = 3 where it has 2" in capsys.readouterr().err


@LOADS
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_weights_are_judged_in_their_own_network(config, capsys, command):
    """Settings that no shape of a weight shows."""
    assert run("fit", config) == 0
    checkpoint = ["--ckpt_path", str(runs(config.parent / "runs")[0] / "checkpoints" / "end.ckpt")]
    capsys.readouterr()
    settings = "--model.init_args.network.init_args"
    assert run(command, config, *checkpoint, f"{settings}.tensorization", "{16: [2, 8]}") == 2
    error = capsys.readouterr().err
    assert "expected the network of the checkpoint" in error
    assert "`model.init_args.network.init_args.tensorization` = {'16': [2, 8]} where it has None" in error
    assert run(command, config, *checkpoint, f"{settings}.implementation", "reconstruct") == 0


@LOADS
def test_predict_writes_the_classes(config, capsys):
    assert run("fit", config) == 0
    printed = capsys.readouterr().out
    assert "Logs and checkpoints: " in printed  # without a monitor there is no figure
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("│")] == ["validation", "test"]
    checkpoint = runs(config.parent / "runs")[0] / "checkpoints" / "end.ckpt"
    assert run("predict", config, "--ckpt_path", str(checkpoint)) == 0
    with np.load(runs(config.parent / "runs")[1] / "classes.npz") as written:
        classes, probabilities = written["classes"], written["probabilities"]
    loaded = ImageClassificationTask.load_from_checkpoint(checkpoint, weights_only=True).eval()
    with torch.no_grad():
        expected = torch.cat([loaded(images).softmax(1) for images, _ in Batches(seed=2, sizes=(4, 4))])
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-6)
    assert classes.tolist() == expected.argmax(1).tolist()

    writer = ["--trainer.callbacks+=PredictedClassesWriter", "--trainer.callbacks.name=mine.csv"]
    assert run("predict", config, "--ckpt_path", str(checkpoint), *writer) == 0
    lines = (runs(config.parent / "runs")[2] / "mine.csv").read_text().splitlines()
    assert lines[0] == "class,p0,p1,p2,p3,p4"
    assert lines[1].startswith(f"{classes[0]},{probabilities[0, 0]:.9g}")
    assert len(lines) == 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "CIFAR10DataModule", "--data.init_args.noise", "foo"], ["a number, or a class", "SymmetricNoise"]),
        (["--model.init_args.network.init_args.rank", "0"], ["`rank`, got 0 in conv1"]),
        (["--model.init_args.network.init_args.depth", "21"], ["[20, 32, 44, 56]", "`depth`, got 21"]),
        (["--model.init_args.network.init_args.tensorization", "{16: [4, 2]}"], ["factors of 16", "[4, 2] in conv1"]),
        (["--model.init_args.lr_scheduler", "cosin"], ["lr_scheduler`", "'cosin'"]),
        (["--model.init_args.lr_scheduler", "one_cycle", "--trainer.max_epochs", "-1"], ["run without an end"]),
        (["--model.init_args.optimizer", "Rprop", "--model.init_args.core_weight_decay", "1"], ["1.0, got Rprop"]),
    ],
)
def test_one_line_says_what_is_wrong(config, capsys, arguments, words):
    assert run("fit", config, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert line.startswith("tenzoo: error: expected ")
    for word in words:
        assert word in line
