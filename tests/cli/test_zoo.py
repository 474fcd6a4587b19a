"""``tenzoo list`` and ``tenzoo describe``."""

import json
import logging
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tenzoo.cli import main
from tenzoo.cli.app import COMMANDS
from tenzoo.cores import find_core_groups
from tenzoo.layers import TensorizedConv2d, TensorizedLinear
from tenzoo.layers.cost import Positions
from tenzoo.tasks import ImageClassificationTask
from tenzoo.zoo import create_model, list_models, load_task, model_info
from tenzoo.zoo.description import describe, totals
from tenzoo.zoo.results import read_results

CONFIGS = Path(__file__).parents[2] / "configs"
RING = ("--config", str(CONFIGS / "tr_resnet20_cifar10.yaml"))


def printed(capsys, *argv):
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_every_config_is_listed_with_its_size(capsys):
    entries = {Path(entry["config"]).stem: entry for entry in printed(capsys, "list", "--configs", str(CONFIGS))}
    assert set(entries) == {path.stem for folder in (CONFIGS, CONFIGS / "text") for path in folder.glob("*.yaml")}
    ring = entries["tr_resnet20_cifar10"]
    assert (ring["model"], ring["data"], ring["parameters"]) == ("tr CIFARResNet-20", "CIFAR10", 55_826)
    assert ring["compression"] == pytest.approx(269_722 / 55_826)
    assert entries["resnet20_cifar10"]["compression"] == 1
    assert entries["covid_tucker_paper"]["parameters"] == 8 * 6 * 8 + 8 * 438 + 6 * 6 + 8 * 11
    small = entries["tt_resnet20_compressed"]
    assert (small["model"], small["parameters"]) == ("(made by tenzoo compress)", None)
    missing = {"(weights not there)", "(needs pip install tenzoo[text])"}
    assert entries["minilm_sst2_loretta"]["model"] in missing
    assert 0.5733 in [result["value"] for result in entries["tr_resnet32_label_noise"]["published"]]


def test_results_are_those_of_configs():
    results = read_results(CONFIGS)
    assert set(results) <= set(list_models())
    measured = [each for found in results.values() for each in found.measured]
    assert all(each.command.startswith("tenzoo fit --config zoo:") and each.seeds for each in measured)
    assert all(each.source for found in results.values() for each in found.published)


def test_numbers_are_the_same_in_python_and_on_the_command_line(capsys):
    (entry,) = printed(capsys, "list", "tr_resnet20_cifar10")
    info = model_info("tr_resnet20_cifar10")
    assert entry == json.loads(json.dumps(asdict(info)))
    assert info.measured[0].value == 0.8573
    network = create_model("tr_resnet20_cifar10")
    assert sum(parameter.numel() for parameter in network.parameters()) == info.parameters
    assert isinstance(load_task("zoo:tr_resnet20_cifar10"), ImageClassificationTask)


def test_a_model_is_made_with_other_arguments():
    small = create_model("tr_resnet20_cifar10", rank=5)
    rings = [layer.factorization for layer in small.modules() if isinstance(layer, TensorizedConv2d)]
    assert {rank for ring in rings for rank in ring.rank} == {5}
    completion = create_model("covid_tucker", rank=[2, 2, 2])
    assert find_core_groups(completion)[0].cores[0].shape == (2, 2, 2)
    with pytest.raises(ValueError, match="got 'methods/das', a config that is composed over one"):
        create_model("methods/das")
    with pytest.raises(ValueError, match="got 'covid'"):
        model_info("covid")


@pytest.mark.parametrize("columns", [80, 120])
def test_a_list_fits_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["list", "t*_resnet20_cifar10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    (ring,) = (line.split() for line in lines if "tr_resnet20_cifar10" in line)
    data = ["CIFAR10"] if columns == 120 else []
    assert ring == ["tr_resnet20_cifar10", "tr", "CIFARResNet-20", *data, "55,826", "4.8", "85.73", "%"]


def test_a_list_of_one_says_where_its_numbers_are_from(capsys):
    assert main(["list", "covid_tucker_paper"]) == 0
    said = capsys.readouterr().out
    assert "published: r2 observed 0.9482: Adam\n    arXiv:2508.10435\n" in said
    assert "measured: r2 held out -279: Adam, seeds 42, 87, 100\n    tenzoo fit --config zoo:covid_tucker_" in said


def test_parts_are_listed_apart(capsys):
    assert main(["list", "methods/*"]) == 0
    assert "methods/  adam adamw asam das das_gauge_fixed rebalance sam sgd" in capsys.readouterr().out
    assert main(["list", "nothing*"]) == 2
    assert "`PATTERN`, got 'nothing*', which none matches" in capsys.readouterr().err


def test_configs_of_the_folder_are_listed_beside_those_of_the_zoo(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["copy", "covid_tucker", "configs"]) == 0
    (tmp_path / "configs" / "covid_tucker.yaml").rename(tmp_path / "configs" / "covid_mine.yaml")
    capsys.readouterr()
    names = [entry["name"] for entry in printed(capsys, "list", "covid*")]
    assert names == ["covid_tucker", "covid_tucker_paper", "covid_mine"]


# --- a project of one's own ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_project_trains_and_passes_its_tests(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "project"
    assert main(["init", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"README.md", "stripes.py", "stripes.yaml", "test_stripes.py"}
    monkeypatch.chdir(folder)
    words = ["-p", "no:cacheprovider", "-q", "-k", "found or das"]
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=8", "--config", "methods/das"]
    argv = ["tenzoo", "fit", "--config", "stripes.yaml", *few]
    code = f"import sys, pytest; from tenzoo.cli import run; pytest.main({words}); sys.argv = {argv}; run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "2 passed" in done.stdout, done.stdout
    assert done.returncode == 0, done.stderr
    assert "Metrics of the weights" in done.stdout.partition("2 passed")[2]
    assert "validation" in done.stdout.partition("2 passed")[2]
    (folder / "stripes.py").write_text("mine")
    assert main(["init", str(folder)]) == 2
    assert "`DIR`" in capsys.readouterr().err
    assert (folder / "stripes.py").read_text() == "mine"


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_imports_nothing_heavy():
    code = "import sys; from tenzoo.cli import main; main(['--help']); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith("\nFalse\n")
    named = {line.split()[0] for line in said.splitlines() if line.startswith("  ") and "tenzoo" not in line}
    assert named == {*COMMANDS, *LightningCLI.subcommands()}
    assert max(map(len, said.splitlines())) <= 80


# --- names of configs ------------------------------------------------------------------------------------------------


def test_a_name_serves_as_a_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    by_path = printed(capsys, "describe", "--config", str(CONFIGS / "covid_tucker.yaml"))
    for words in (["--config", "zoo:covid_tucker"], ["-c", "covid_tucker"], ["--config=covid_tucker"]):
        assert printed(capsys, "describe", *words) == by_path
    (tmp_path / "covid_tucker").write_text((CONFIGS / "covid_tucker_paper.yaml").read_text())
    (own,) = printed(capsys, "describe", "--config", "covid_tucker")
    assert own["rank"] == [8, 6, 8]
    assert printed(capsys, "describe", "--config", "zoo:covid_tucker") == by_path


def test_a_copy_is_the_config_and_overwrites_nothing(tmp_path, capsys):
    folder = tmp_path / "new"
    assert main(["copy", "zoo:methods/das", str(folder)]) == 0
    copied = folder / "das.yaml"
    assert copied.read_bytes() == (CONFIGS / "methods" / "das.yaml").read_bytes()
    assert str(copied) in capsys.readouterr().out
    copied.write_text("mine")
    assert main(["copy", "methods/das", str(folder)]) == 2
    assert "`DIR`" in capsys.readouterr().err
    assert copied.read_text() == "mine"


def test_a_described_network_adds_up(capsys):
    layers = printed(capsys, "describe", "--config", str(CONFIGS / "cp_resnet20_cifar10.yaml"))
    assert sum(layer["parameters"] for layer in layers) == 76_326
    assert sum(layer["dense_parameters"] for layer in layers) == 269_722
    convolutions = [layer for layer in layers if layer["kind"] == "TensorizedConv2d"]
    assert len(convolutions) == 19
    last = convolutions[-1]
    assert (last["name"], last["core_group"]) == ("layer3.2.conv2", "layer3.2.conv2.weight")
    assert (last["shape"], last["modes"], last["rank"]) == ([64, 64, 3, 3], [64, 9, 64], [50])
    cheaper = min(last["milliseconds"], key=last["milliseconds"].get)
    assert last["contraction"] == cheaper == "contract"


def test_later_runs_are_as_talkative_as_before(capsys):
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    printed(capsys, "describe", *RING)
    assert logger.level == before != logging.WARNING


def test_tables_are_printed(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    config = CONFIGS / "tr_resnet20_cifar10.yaml"
    assert main(["describe", "--config", str(config)]) == 0
    table = capsys.readouterr().out
    assert "tr rank 10 of 4×4×4×9×4×4×4" in table
    assert "55,826" in table
    (tmp_path / config.name).write_bytes(config.read_bytes())
    assert main(["list", "--configs", str(tmp_path)]) == 0
    assert "tr_resnet20_cifar10" in capsys.readouterr().out


def test_a_completion_is_described_for_the_shape_of_its_data(capsys):
    (layer,) = printed(capsys, "describe", "--config", str(CONFIGS / "covid_tucker.yaml"))
    assert (layer["shape"], layer["rank"], layer["core_group"]) == ([438, 6, 11], [48, 6, 11], "tensor")


def test_operations_are_those_of_the_way_that_is_taken():
    dense, low = nn.Linear(40, 30), TensorizedLinear(40, 30, factorization="tucker", rank=2, implementation="contract")
    kernel = TensorizedConv2d(4, 6, 3, padding=1, factorization="tt", rank=5, implementation="reconstruct")
    rows = torch.empty(16, 40, device="meta")
    (plain,) = describe(dense, rows)
    assert plain.multiplications == 16 * 40 * 30
    (layer,) = describe(low, rows)
    assert layer.multiplications == pytest.approx(16 * (40 * 2 + 2 * 2 + 2 * 30))
    (layer,) = describe(kernel, torch.empty(2, 4, 8, 8, device="meta"))
    assert layer.multiplications == pytest.approx(2 * 64 * 4 * 9 * 6 + kernel.factorization.multiplications)


class Tied(nn.Module):
    """Two names for one weight, a call by keyword, and a parameter beside the layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(8, 8))

    def forward(self, x):
        return self.second(input=self.first(x) @ self.scale)


def contracted(kind, *args, **kwargs):
    return kind(*args, factorization="tt", rank=4, implementation="contract", **kwargs)


def twice(layer):
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: twice(nn.Linear(32, 32)), (8, 32)),
        (lambda: twice(contracted(TensorizedLinear, 32, 32)), (8, 32)),
        (lambda: twice(contracted(TensorizedConv2d, 8, 8, 3)), (2, 8, 9, 9)),
        (lambda: contracted(TensorizedConv2d, 8, 16, 5), (2, 8, 12, 12)),
        (lambda: contracted(TensorizedConv2d, 8, 16, 3, stride=2, padding=1), (2, 8, 7, 7)),
        (Tied, (5, 8)),
        (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (3, 5, 16)),
    ],
)
def test_a_described_network_has_the_operations_and_parameters_that_torch_counts(make, shape):
    model = make()
    layers = describe(model, torch.empty(shape, device="meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(shape))
    assert 2 * sum(layer.multiplications or 0 for layer in layers) == pytest.approx(counter.get_total_flops())
    assert totals(layers)[0] == sum(parameter.numel() for parameter in model.parameters())
    assert all(layer.compression > 0 for layer in layers)


def test_a_layer_that_takes_both_ways_says_so():
    layer = TensorizedLinear(256, 256, factorization="tt", rank=64)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x[:2]), self.layer(x)

    (described,) = describe(Both(), torch.empty(16384, 256, device="meta"))
    ways = {layer.choose(Positions(rows, rows), "training") for rows in (2, 16384)}
    assert set(described.contraction.split(" and ")) == ways == {"contract", "reconstruct"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["list", "--configs", "nowhere"], ["`--configs`", "'nowhere'"]),
        (["list", "--foo"], ["--foo"]),
        (["copy"], ["tenzoo copy", "NAME"]),
        (["init"], ["tenzoo init", "DIR"]),
        (["copy", "methods/dsa"], ["'methods/dsa'; did you mean 'methods/sam'?"]),
        (["describe", "--config", "covid_tuker"], ["`--config`", "did you mean 'covid_tucker'?"]),
        (["describe", "--config", "zoo:das"], ["'zoo:das'; did you mean 'methods/das'?"]),
        (["fit", "--config", "configs/covid.yaml"], ["'configs/covid.yaml', which does not exist"]),
        (["lst"], ["got 'lst'; did you mean 'list'?"]),
        (["describe"], ["the following arguments are required: data, model"]),
        (["describe", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["describe", *RING, "--model.init_args.network.init_args.rank=0"], ["`rank`, got 0", "conv1"]),
    ],
)
def test_mistakes_end_in_one_line(capsys, argv, words):
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("tenzoo: error: ")
    assert all(word in line for word in words)


def test_one_broken_config_hides_no_other(tmp_path, capsys):
    good = (CONFIGS / "tr_resnet20_cifar10.yaml").read_text()
    (tmp_path / "good.yaml").write_text(good)
    (tmp_path / "broken.yaml").write_text("model: [1,")
    (tmp_path / "unknown.yaml").write_text(good.replace("rank: 10", "rnak: 10"))
    (tmp_path / "zero.yaml").write_text(good.replace("rank: 10", "rank: 0"))
    assert main(["list", "--json", "--configs", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert [Path(entry["config"]).stem for entry in json.loads(printed.out)] == ["good"]
    first, second, third = printed.err.strip().splitlines()
    assert f"expected YAML in {str(tmp_path / 'broken.yaml')!r}, got a fault in line 2: " in first
    assert f"got 'rnak' (in {str(tmp_path / 'unknown.yaml')!r})" in second
    assert f"`rank`, got 0 in conv1 (in {str(tmp_path / 'zero.yaml')!r})" in third


BAD = ["{", "[1]", '{"a": 1}', '{"a": {"published": 3}}', '{"a": {"b": "c"}}', "[" * 100_000]


@pytest.mark.parametrize("text", BAD)
def test_results_that_are_none(tmp_path, capsys, text):
    (tmp_path / "results.json").write_text(text)
    assert main(["list", "--configs", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("tenzoo: error: expected ")
    assert str(tmp_path / "results.json") in line
    assert len(line) < 400
