"""What is printed fits the terminal, and says no more than there is to say."""

import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from tenzoo.cli import main
from tenzoo.cli.bar import TrainingBar, packed
from tenzoo.cli.report import print_metrics
from tenzoo.cli.summary import NetworkSummary
from tenzoo.cli.tables import _command
from tenzoo.compression import plan
from tenzoo.zoo.reading import quiet
from tests.cli.test_commands import config, run  # noqa: F401  (fixtures)
from tests.tasks.toy import Batches, Regression, sgd, trainer

SHOWN = ["--trainer.enable_progress_bar=true", "--trainer.enable_model_summary=true"]
NOISE = ("TPU", "FLOPs", "ModuleDict", "Epoch 0/-2", "v_num", "0.00it/s", "already configured")


def widest(text):
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize("columns", [80, 120])
def test_fit(config, capsys, caplog, monkeypatch, columns):  # noqa: F811
    monkeypatch.setenv("COLUMNS", str(columns))
    with caplog.at_level("INFO"):
        assert run("fit", config, *SHOWN, "--trainer.max_epochs=-1", "--trainer.max_steps=6") == 0
    printed = capsys.readouterr()
    out = printed.out
    for noise in NOISE:
        assert noise not in out + printed.err + caplog.text
    assert widest(out.rpartition("Logs")[0]) <= columns
    (bar,) = [line for line in out.splitlines() if "━━ " in line and line.startswith(("Epoch", "Validation"))]
    assert re.match("Epoch 1 ━+ 3/3 ", bar)
    assert re.search(r"^[\d.,]+ batches/s  [\d.,]+ samples/s ", out, re.MULTILINE)
    assert "val/r2 " in out
    assert "parameters; " in out


@pytest.mark.sampled(2)
@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["list", "*tucker*"],
        ["list", "covid_tucker"],
        ["describe", "--config", "tr_resnet20_cifar10"],
        ["describe", "--config", "btt_picogpt"],
    ],
    ids=" ".join,
)
def test_tables(capsys, monkeypatch, columns, words):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("config: ")]  # a whole path
    assert max(map(len, lines)) <= columns
    if words[0] == "describe":
        assert not any(line.endswith("-") for line in lines)
        layer = "conv1" if "tr_resnet20_cifar10" in words else "embedding"
        (row,) = [line.split() for line in lines if line.split()[:1] == [layer]]
        assert row[1] in ("16×3×3×3", "65×128")
        assert ("core group" in "".join(lines)) is (columns == 120)


@pytest.mark.parametrize("columns", [80, 120])
def test_metrics_at_the_end(capsys, monkeypatch, tmp_path, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    names = [f"metric_number_{number}" for number in range(9)] + ["a_long_name_of_a_metric_" * 5]
    metrics = {f"{split}/{name}": 1234.5 for split in ("train", "val", "held_out") for name in names}
    judge = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    print_metrics(judge, metrics, weights="the last weights")
    lines = capsys.readouterr().out.rpartition("Logs")[0].splitlines()
    assert max(map(len, lines)) <= columns
    assert len([line for line in lines if "1234.5000" in line]) == 10
    assert any(re.search("metric_number_3 +│ +1234.5000 │ +1234.5000 │ +1234.5000 │", line) for line in lines)
    print_metrics(judge, {"val/r2": 0.5}, weights="the last weights")
    assert "│ validation │ 0.5000 │" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 120])
def test_plan(columns):
    torch.manual_seed(0)
    names = [f"a_block_with_a_name.that_is_long.{number}.weight" for number in range(3)]
    network = nn.ModuleDict({name.replace(".", "_"): nn.Linear(64, 64) for name in names})
    network["small"] = nn.Linear(4, 4)
    table = plan(network, factorization="tt", ranks=8).table(columns)
    assert widest(table) <= columns
    assert re.search("a_block_w[a-z_]*…?[a-z_]*0_weight +64×64 +tt 8 ", table)
    assert "multiplications" not in table


def test_a_command_stays_one():
    command = "tenzoo fit --config zoo:covid_tucker --config zoo:methods/sam --model.init_args.sam.rho 0.01"
    lines = _command(command, 40)
    assert all(len(line) <= 40 for line in lines)
    assert "".join(line.removesuffix("\\") for line in lines).split() == command.split()


def test_words_are_not_split():
    words = ["1.0 batches/s", "val/" + "long" * 30 + " 1.5", "train/loss 2.000"]
    lines = packed(words, 80)
    assert [len(line) <= 80 for line in lines] == [True] * 3
    assert lines[1].startswith("val/long")
    assert lines[1].endswith("long 1.5")


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 5)


class Sized(LightningModule):
    """Has an input, so that its operations are counted, and a part that is frozen in evaluation."""

    def __init__(self):
        super().__init__()
        self.a_part_with_a_name_that_is_longer_than_its_column_is_wide = Shared()
        self.head = nn.Linear(6, 3)
        self.empty = nn.ModuleDict()
        self.example_input_array = torch.zeros(2, 6)
        self.head.requires_grad_(False).eval()

    def forward(self, inputs):
        return self.head(inputs)


def test_a_network_with_an_input_shows_what_was_counted(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    NetworkSummary().on_fit_start(Trainer(logger=False, accelerator="cpu", enable_progress_bar=False), Sized())
    out = capsys.readouterr().out
    assert "FLOPs" in out
    assert "eval" in out
    assert "ModuleDict" not in out
    assert re.search("│ a_part_w[a-z_]*…[a-z_]*wide │ Shared │", out)
    assert "56 parameters, 35 of them trained" in out
    assert widest(out) <= 80


def test_samples_of_an_epoch_are_counted_and_no_step_waits_for_them(tmp_path, monkeypatch):
    bar = TrainingBar()
    looks = []
    monkeypatch.setattr(TrainingBar, "_update_metrics", lambda *_: looks.append(bar._batches))
    fit = trainer(tmp_path, max_epochs=2, callbacks=[bar], enable_progress_bar=True)
    torch.manual_seed(1)
    fit.fit(Regression(optimizer=sgd()), Batches(count=40, size=7), Batches())
    assert (bar._batches, bar._items) == (40, 280)
    assert len(looks) < 20  # not once a batch


def test_lightning_says_what_can_be_acted_on(caplog):
    from lightning.pytorch.utilities import rank_zero_info

    quiet()
    with caplog.at_level("INFO"):
        rank_zero_info("TPU available: False, using: 0 TPU cores")
        rank_zero_info("TPU available: True, using: 8 TPU cores")
    assert [record.getMessage() for record in caplog.records] == ["TPU available: True, using: 8 TPU cores"]
