"""``tenzoo compress``: weights in, plan and weights out, and what is refused."""

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from tenzoo.cli import main
from tenzoo.compression import Plan, apply_
from tenzoo.data import CIFAR10DataModule
from tenzoo.models import CIFARResNet, CompressedNetwork
from tests.models.test_resnet import with_statistics

OFFLINE = ["--calibration.download", "false"]


@pytest.fixture
def config(tmp_path):
    """A config that compresses a ResNet-20 of random weights."""
    network = with_statistics(CIFARResNet(20))
    torch.save({"state_dict": network.state_dict()}, tmp_path / "dense.ckpt")
    save_file(network.state_dict(), tmp_path / "dense.safetensors")
    path = tmp_path / "compress.yaml"
    settings = {
        "network": {"class_path": "tenzoo.models.CIFARResNet", "init_args": {"depth": 20}},
        "weights": str(tmp_path / "dense.ckpt"),
        "factorization": "tucker",
        "budget": 0.5,
        "output": str(tmp_path / "small"),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def compress(config, *arguments):
    return main(["compress", "--config", str(config), *arguments])


def opened(config):
    folder = config.parent / "small"
    return CompressedNetwork(CIFARResNet(20), str(folder / "plan.json"), str(folder / "weights.pt")).eval()


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


def test_calibration_data(config, root):
    data = {"class_path": "CIFAR10DataModule", "init_args": {"root": root, "validation_size": 10, "batch_size": 16}}
    settings = yaml.safe_load(config.read_text()) | {"calibration": data, "calibration_size": 40}
    config.write_text(yaml.safe_dump(settings))
    assert compress(config) == 0
    made = Plan.load(config.parent / "small" / "plan.json")
    assert made.data_aware
    data = CIFAR10DataModule(root, validation_size=10, batch_size=16)
    data.setup("fit")
    batches = [data.on_after_batch_transfer(batch, 0)[0] for batch in data.train_dataloader()]
    images = torch.cat(batches)[:40]
    dense = CIFARResNet(20).load_pretrained(config.parent / "dense.ckpt").eval()
    from tenzoo.compression import plan

    again = plan(dense, factorization="tucker", budget=0.5, calibration=images)
    assert [layer.rank for layer in again.layers] == [layer.rank for layer in made.layers]


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
        (["--factorization", "cpd"], ["['btt', 'cp', 'tr', 'tt', 'tucker']", "'cpd'"]),
        (["--budget", "0.001"], ["in `budget`", "the least that this model can be brought to"]),
        (["--budget", "1.5"], ["a float in (0, 1]", "1.5"]),
        (["--budget", "half"], ["in `budget`, got half"]),
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


def test_nothing_is_overwritten(config, capsys):
    assert compress(config) == 0
    before = (config.parent / "small" / "plan.json").read_text()
    assert compress(config, "--budget", "0.4") == 2
    assert "without plan.json in `output`" in capsys.readouterr().err
    assert (config.parent / "small" / "plan.json").read_text() == before


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
