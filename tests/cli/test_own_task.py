"""The command line asks a task what it needs to know, and says where a task does not answer."""

import json

import pytest
import torch
from lightning.pytorch import LightningDataModule

from tenzoo.cli import main
from tenzoo.models import CIFARResNet
from tenzoo.tasks import ImageClassificationTask
from tests.cli.test_commands import CONFIG, config, run  # noqa: F401  (config is a fixture)
from tests.runs import runs

OWN = "factorization: cp, rank: 2, "


def with_own_task(path, name):
    path.write_text(path.read_text().replace("tenzoo.tasks.CompletionTask", f"tests.cli.own_task.{name}"))
    path.write_text(path.read_text().replace(OWN, ""))
    return path


def test_predictions_are_written_by_the_writer_of_the_task(config, capsys):  # noqa: F811
    with_own_task(config, "Answering")
    assert run("fit", config) == 0
    assert "Metrics" not in capsys.readouterr().out  # no final evaluation
    last = runs(config.parent / "runs")[0] / "checkpoints" / "last.ckpt"
    assert run("predict", config, "--ckpt_path", str(last)) == 0
    assert (runs(config.parent / "runs")[1] / "rated.csv").read_text().startswith("i0,i1,i2,value,known\n0,0,0,")
    writer = ["--trainer.callbacks+=CompletedEntriesWriter", "--trainer.callbacks.name=mine.csv"]
    assert run("predict", config, "--ckpt_path", str(last), *writer) == 0
    names = {path.name for path in runs(config.parent / "runs")[2].iterdir()}
    assert "mine.csv" in names
    assert "rated.csv" not in names


def test_a_task_without_a_writer_says_so(config, caplog):  # noqa: F811
    with_own_task(config, "OwnTask")
    assert run("fit", config) == 0
    last = runs(config.parent / "runs")[0] / "checkpoints" / "last.ckpt"
    caplog.clear()
    assert run("predict", config, "--ckpt_path", str(last)) == 2  # it has no forward() either
    (line,) = (record.getMessage() for record in caplog.records if "predictions" in record.getMessage())
    assert line.startswith("predictions are not written: OwnTask.prediction_writer() gives None")


def test_a_task_is_described_by_its_own_network_and_input(config, capsys):  # noqa: F811
    with_own_task(config, "Answering")
    assert main(["describe", "--json", "--config", str(config)]) == 0
    printed = capsys.readouterr()
    first, second = json.loads(printed.out)
    assert (first["multiplications"], second["multiplications"]) == (5 * 7 * 5 * 4 * 2 * 9, 5 * 5 * 3 * 4 * 4 * 9)
    assert printed.err == ""


def test_a_task_without_an_example_input_says_so(config, capsys):  # noqa: F811
    with_own_task(config, "OwnTask")
    assert main(["describe", "--json", "--config", str(config)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "tenzoo: multiplications are not counted: OwnTask.example_input() gives none for CompletionDataModule"
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 12)])
def test_the_example_input_has_the_shape_of_the_images_of_the_data(shape):
    class Data(LightningDataModule):
        image_shape = shape

        def __init__(self, batch_size):
            super().__init__()
            self.save_hyperparameters()

    task = ImageClassificationTask(CIFARResNet(20))
    images = task.example_input(Data(4))
    assert (images.shape, images.device) == (torch.Size((4, *shape)), torch.device("meta"))
    assert task.example_input(LightningDataModule()) is None
