"""``tenzoo compress``: weights in, plan and weights out, and what is refused."""

import copy
import re
from unittest.mock import Mock

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tenzoo.cli import main
from tenzoo.cli.compress import printed_progress
from tenzoo.compression import Plan, apply_, refine_
from tenzoo.compression.progress import each
from tenzoo.data import CIFAR10DataModule
from tenzoo.models import CIFARResNet, CompressedNetwork
from tests.compression.test_read_weights import product
from tests.models.test_resnet import with_statistics

OFFLINE = ["--calibration.download", "false"]


@pytest.fixture
def config(tmp_path):
    """A config that compresses a ResNet-20 of random weights."""
    network = {"class_path": "tenzoo.models.CIFARResNet", "init_args": {"depth": 20}}
    return write_config(tmp_path, with_statistics(CIFARResNet(20)), network)


class Shallow(nn.Sequential):
    """Four layers for images: with calibration data the time is that of the layers."""

    def __init__(self):
        first, second = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 24, 3, stride=2)
        super().__init__(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(24, 24, 3), nn.Flatten(), nn.Linear(600, 10))


@pytest.fixture
def shallow(tmp_path):
    """As ``config``, of a network of few layers."""
    torch.manual_seed(0)
    return write_config(tmp_path, Shallow(), {"class_path": f"{__name__}.Shallow"})


def write_config(tmp_path, network, named):
    torch.save({"state_dict": network.state_dict()}, tmp_path / "dense.ckpt")
    save_file(network.state_dict(), tmp_path / "dense.safetensors")
    path = tmp_path / "compress.yaml"
    settings = {
        "network": named,
        "weights": str(tmp_path / "dense.ckpt"),
        "factorization": "tucker",
        "budget": 0.5,
        "output": str(tmp_path / "small"),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def compress(config, *arguments):
    return main(["compress", "--config", str(config), *arguments])


def opened(config, network=None):
    folder, network = config.parent / "small", network or CIFARResNet(20)
    return CompressedNetwork(network, str(folder / "plan.json"), str(folder / "weights.pt")).eval()


@pytest.mark.parametrize("weights", ["dense.ckpt", "dense.safetensors"])
def test_a_plan_and_weights_come_out(config, capsys, weights):
    assert compress(config, "--weights", str(config.parent / weights)) == 0
    printed = capsys.readouterr().out
    made = Plan.load(config.parent / "small" / "plan.json")
    assert f"{made.parameters:,}" in printed
    assert made.parameters <= 0.5 * made.dense_parameters
    assert not made.data_aware
    network = opened(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == made.parameters
    dense = CIFARResNet(20).load_pretrained(config.parent / "dense.ckpt").eval()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(network(images), apply_(dense, made)(images))


def test_ranks_by_name_and_layers_that_stay(config):
    assert compress(config, "--budget", "null", "--ranks", "{layer3.1.conv1: [8, 4, 8], layer3.1.conv2: 6}") == 0
    made = Plan.load(config.parent / "small" / "plan.json")
    ranks = {layer.name: layer.rank for layer in made.layers if layer.rank}
    assert ranks == {"layer3.1.conv1": (8, 4, 8), "layer3.1.conv2": (6, 6, 6)}


def test_calibration_data(shallow, root):
    data = {"class_path": "CIFAR10DataModule", "init_args": {"root": root, "validation_size": 10, "batch_size": 16}}
    settings = yaml.safe_load(shallow.read_text()) | {"calibration": data, "calibration_size": 20}
    shallow.write_text(yaml.safe_dump(settings))
    assert compress(shallow) == 0
    made = Plan.load(shallow.parent / "small" / "plan.json")
    assert made.data_aware
    data = CIFAR10DataModule(root, validation_size=10, batch_size=16)
    data.setup("fit")
    batches = [data.on_after_batch_transfer(batch, 0)[0] for batch in data.train_dataloader()]
    images = torch.cat(batches)[:20]
    dense = Shallow()
    dense.load_state_dict(torch.load(shallow.parent / "dense.ckpt")["state_dict"])
    from tenzoo.compression import plan

    again = plan(dense, factorization="tucker", budget=0.5, calibration=images)
    assert [layer.rank for layer in again.layers] == [layer.rank for layer in made.layers]


def test_cores_are_refined(shallow, root):
    data = {"class_path": "CIFAR10DataModule", "init_args": {"root": root, "validation_size": 10, "augment": False}}
    settings = yaml.safe_load(shallow.read_text()) | {"calibration": data, "calibration_size": 24, "refine": 2}
    shallow.write_text(yaml.safe_dump(settings))
    assert compress(shallow) == 0
    data = CIFAR10DataModule(root, validation_size=10, augment=False)
    data.setup("fit")
    images = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)[0][:24]
    dense = Shallow()
    dense.load_state_dict(torch.load(shallow.parent / "dense.ckpt")["state_dict"])
    made = Plan.load(shallow.parent / "small" / "plan.json")
    expected = refine_(apply_(copy.deepcopy(dense), made, calibration=images), dense, calibration=images, epochs=2)
    with torch.no_grad():
        torch.testing.assert_close(opened(shallow, Shallow())(images), expected(images), rtol=1e-6, atol=1e-7)


def test_a_network_of_torchvision(tmp_path):
    import torchvision

    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "squeezenet1_1.pth")
    files = ["--weights", str(tmp_path / "squeezenet1_1.pth"), "--output", str(tmp_path / "small")]
    network = ["--network", "torchvision.models.squeezenet1_1"]
    assert main(["compress", *network, *files, "--factorization", "tt", "--ranks", "8"]) == 0
    assert Plan.load(tmp_path / "small" / "plan.json").parameters < 500_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "nowhere.pt"], ["existing file of weights, got 'nowhere.pt'"]),
        (["--network.init_args.depth", "32"], ["weights of this CIFARResNet", "'layer1.3.conv1.weight' of no shape"]),
        (["--network", "CIFARResNot"], ["a class in `network`", "CIFARResNet", "'CIFARResNot'"]),
        (["--factorization", "cpd"], ["'tt', 'tucker'] or an einsum", "'cpd'"]),
        (["--budget", "0.001"], ["in `budget`", "the least that this model can be brought to"]),
        (["--budget", "1.5"], ["a float in (0, 1]", "1.5"]),
        (["--budget", "half"], ["in `budget`, got half"]),
        (["--budget", "100000000"], ["fewer parameters in `budget` than the 269,722 of the model, got 100,000,000"]),
        (["--calibration_size", "4"], ["`calibration` with `calibration_size` 4, got none"]),
        (["--refine", "2"], ["`calibration` with `refine` 2, got none"]),
        (["--refine", "-1"], ["an int >= 0 in `refine`, got -1"]),
        (["--ranks", "3"], ["one of `budget` and `ranks`"]),
        (["--exclude", "[conv9]"], ["`exclude`", "'conv9'"]),
        (["--output", ""], ["a folder", "`output`, got ''"]),
        (["--buget", "0.5"], ["budget", "'buget'"]),
        (["--calibration", "CIFAR10DataModule", "--calibration_size", "0"], ["`calibration_size`, got 0"]),
        (["--calibration", "CIFAR10DataModule", "--calibration.root", "/nowhere", *OFFLINE], ["'/nowhere'"]),
    ],
)
def test_one_line_says_what_is_wrong(config, capsys, arguments, words):
    assert compress(config, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert error.startswith("tenzoo: error: expected ")
    for word in words:
        assert word in error
    assert not (config.parent / "small").exists()


def test_nothing_is_overwritten(shallow, capsys):
    assert compress(shallow) == 0
    before = (shallow.parent / "small" / "plan.json").read_text()
    assert compress(shallow, "--budget", "0.4") == 2
    assert "without plan.json in `output`" in capsys.readouterr().err
    assert (shallow.parent / "small" / "plan.json").read_text() == before


# --- what is printed -----------------------------------------------------------------------------------------------


def test_phases_are_printed_at_once_and_fit_a_narrow_terminal(shallow, root, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = []
    monkeypatch.setattr(
        "builtins.print", lambda *words, flush=False, **_: printed.append((" ".join(map(str, words)), flush))
    )
    data = {"class_path": "CIFAR10DataModule", "init_args": {"root": root, "validation_size": 10, "batch_size": 8}}
    settings = yaml.safe_load(shallow.read_text()) | {"calibration": data, "calibration_size": 8}
    shallow.write_text(yaml.safe_dump(settings))
    assert compress(shallow) == 0
    phases = [line for line, flush in printed if flush]
    assert [
        re.sub(r"\d+", "N", phase.partition(":")[0]) for phase in phases if " of " not in phase.partition(":")[2]
    ] == [
        "reading the weights",
        "reading calibration data",
        "running the model on `calibration`, samples",
        "measuring inputs and gradients of N layers",
        "trying ranks of layers",
        "measuring how far the outputs move with layers",
        "choosing ranks of layers",
        "decomposing layers",
        "choosing ranks of layers",  # without the inputs, to be compared
        "decomposing layers",
        "replacing layers",
        "running the compressed model once",
        "writing the files",
    ]
    table = printed[-2][0]
    assert max(map(len, "\n".join([*phases, table]).splitlines())) <= 80
    made = Plan.load(shallow.parent / "small" / "plan.json")
    assert f"{made.parameters:,}" in table
    assert f"{made.dense_parameters:,}" in table


def test_layers_areprinted_progress_every_few_seconds(monkeypatch, capsys):
    now = iter([0.0, 3, 6, 7, 13])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with printed_progress():
        list(each("abcd", "decomposing layers"))
    list(each("abcd", "decomposing layers"))
    expected = ["decomposing layers: 4", "decomposing layers: 2 of 4", "decomposing layers: 4 of 4"]
    assert capsys.readouterr().out.splitlines() == expected


# --- folders and disks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["/proc/tenzoo/small", "{file}/small", "/dev/null/a/b"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_weights_are_read(config, capsys, output):
    (file := config.parent / "file").write_text("")
    assert compress(config, "--output", output.format(file=file), "--weights", "nowhere.pt") == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "expected a folder" in error
    assert "in `output`, got" in error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_leaves_nothing(shallow, capsys, monkeypatch, error):
    monkeypatch.setattr("torch.save", Mock(side_effect=error))
    before = sorted(shallow.parent.rglob("*"))
    assert compress(shallow) == 2
    message = capsys.readouterr().err.strip()
    assert "a folder that can be written to in `output`" in message
    assert (error.strerror if isinstance(error, OSError) else str(error)) in message
    assert sorted(shallow.parent.rglob("*")) == before
    (shallow.parent / "small").mkdir()
    assert compress(shallow) == 2
    assert not list((shallow.parent / "small").iterdir())


# --- inputs and models ---------------------------------------------------------------------------------------------


class Pairs(LightningDataModule):
    """Batches of two arguments and labels, or of arguments by name."""

    def __init__(self, by_name=False):
        super().__init__()
        self.by_name = by_name

    def train_dataloader(self):
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
        data = [{"x": row, "y": row} for row in x] if self.by_name else TensorDataset(x, x, torch.zeros(20))
        return DataLoader(data, batch_size=6)


class TwoInputs(nn.Module):
    def __init__(self, hidden=False):
        super().__init__()
        self.first, self.second, self.hidden = nn.Linear(8, 16), nn.Linear(16, 16), hidden

    def forward(self, x, y):
        z = self.first(x + y)
        if self.hidden:
            return product(self.second, z)
        return self.second(z)


class Optional(TwoInputs):
    def forward(self, x, y, z=None):
        return super().forward(x, y)


@pytest.fixture
def pairs(tmp_path):
    torch.manual_seed(0)
    torch.save(TwoInputs().state_dict(), tmp_path / "dense.pt")

    def run(network, *arguments):
        words = ["--network", f"{__name__}.{network}", "--weights", str(tmp_path / "dense.pt"), *arguments]
        return main(
            ["compress", *words, "--output", str(tmp_path / "small"), "--factorization", "tt", "--budget", "0.8"]
        )

    return run


@pytest.mark.parametrize("by_name", ["true", "false"])
def test_calibration_data_of_several_arguments(pairs, tmp_path, by_name):
    data = ["--calibration", f"{__name__}.Pairs", "--calibration.by_name", by_name, "--calibration_size", "10"]
    assert pairs("TwoInputs", *data) == 0
    x = next(iter(Pairs().train_dataloader()))[0], list(Pairs().train_dataloader())[1][0][:4]
    from tenzoo.compression import plan

    dense = TwoInputs()
    dense.load_state_dict(torch.load(tmp_path / "dense.pt"))
    x = torch.cat(x)
    expected = plan(dense, factorization="tt", budget=0.8, calibration=(x, x))
    made = Plan.load(tmp_path / "small" / "plan.json")
    assert [layer.rank for layer in made.layers] == [layer.rank for layer in expected.layers]
    assert made.layers[0].error == pytest.approx(expected.layers[0].error)


def test_labels_that_could_be_an_argument_are_refused(pairs, tmp_path, capsys):
    assert pairs("Optional", "--calibration", f"{__name__}.Pairs") == 2
    assert "labels cannot be told from inputs" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_a_network_that_does_not_run_is_not_written(pairs, tmp_path, capsys, monkeypatch):
    # The dense model does not tell that something wants the exact class.
    monkeypatch.setattr(TwoInputs, "forward", lambda self, x, y: wants_linear(self.second)(self.first(x + y)))
    assert pairs("TwoInputs", "--calibration", f"{__name__}.Pairs") == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "with its layers made of cores, got RuntimeError: no Linear in TwoInputs (" in error
    assert not (tmp_path / "small").exists()


def wants_linear(layer):
    if type(layer) is not nn.Linear:
        raise RuntimeError("no Linear")
    return layer


def test_a_layer_whose_weight_is_read_is_replaced(pairs, tmp_path):
    assert pairs("TwoInputs", "--network.hidden", "true", "--calibration", f"{__name__}.Pairs") == 0
    made = Plan.load(tmp_path / "small" / "plan.json")
    assert [layer.name for layer in made.layers if layer.rank] == ["second"]
    network = CompressedNetwork(
        TwoInputs(hidden=True), str(tmp_path / "small" / "plan.json"), str(tmp_path / "small" / "weights.pt")
    )
    assert network(torch.ones(2, 8), torch.ones(2, 8)).shape == (2, 16)


def test_files_that_do_not_fit_the_network(config):
    assert compress(config) == 0
    folder = config.parent / "small"
    with pytest.raises(ValueError, match=r"planned layer 'conv1'|layer '.*' in `model`"):
        CompressedNetwork(nn.Sequential(nn.Linear(3, 3)), str(folder / "plan.json"), str(folder / "weights.pt"))
    with pytest.raises(ValueError, match=r"in `weights`, got '.*' of shape"):
        CompressedNetwork(CIFARResNet(20), str(folder / "plan.json"), str(config.parent / "dense.ckpt"))
    with pytest.raises(ValueError, match="expected a plan"):
        CompressedNetwork(CIFARResNet(20), str(folder / "weights.pt"), str(folder / "weights.pt"))
    with pytest.raises(FileNotFoundError, match=r"file in `plan`, got 'nowhere\.json'; tenzoo compress makes it"):
        CompressedNetwork(CIFARResNet(20), "nowhere.json", str(folder / "weights.pt"))


def test_help_is_short(capsys):
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert any("--calibration_size" in line for line in lines)
    assert len(lines) < 80
