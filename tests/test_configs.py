"""Every config under configs/ trains, and every method goes with every model."""

import importlib
from pathlib import Path

import pytest
import torch
import yaml

from tenzoo.cli import main
from tenzoo.compression import Plan
from tenzoo.data import ImageDataModule
from tenzoo.models import CIFARResNet
from tenzoo.zoo.catalog import PARTS
from tests.runs import the_run

ROOT = Path(__file__).parent.parent / "configs"
MODELS = sorted(path for path in ROOT.rglob("*.yaml") if path.parent.name not in (*PARTS, "text"))
"""All but the entries for text, which need the extra of that name: test_text_configs.py."""
METHODS = sorted((ROOT / "methods").glob("*.yaml"))
TINY = str(Path(__file__).parent / "configs" / "tiny.yaml")
SMALLER = {
    "synthetic_sparse_cp": ["--data.init_args.num_entries", "3000", "--data.init_args.shape", "[60,50,40]"],
    "indian_pines_tt": ["--data.init_args.batch_size", "20000", "--data.init_args.observed_fraction", "0.02"],
}
EXPECTED_METHODS = {"sgd", "adam", "adamw", "sam", "asam", "das", "das_gauge_fixed", "rebalance"}


def fit(tmp_path, *configs, args=()):
    composed = [word for config in (*configs, TINY) for word in ("--config", str(config))]
    return main(["fit", *composed, "--trainer.default_root_dir", str(tmp_path), *args])


def test_the_methods_are_all_there():
    assert {path.stem for path in METHODS} >= EXPECTED_METHODS


def images_of(config):
    """The data module of a config, if its data are images."""
    module, _, name = yaml.safe_load(config.read_text())["data"]["class_path"].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    return kind if issubclass(kind, ImageDataModule) else None


def small_images(kind, folder, monkeypatch):
    """A few images, which ``write_small`` in ``tests/data/small_<module of the data>.py`` writes, as arguments."""
    small = importlib.import_module(f"tests.data.small_{kind.__module__.rpartition('.')[2]}")
    small.write_small(folder, monkeypatch)
    settings = {"root": folder, "validation_size": 10, "batch_size": 8}
    return [word for name, value in settings.items() for word in (f"--data.init_args.{name}", str(value))]


def small_corpus(config, path):
    """A text of 65 characters for all splits that a config names, as arguments."""
    path.write_text("".join(map(chr, range(48, 113))) * 20)
    given = yaml.safe_load(config.read_text())["data"]["init_args"]
    if given.get("tokenizer") == "bpe":
        pytest.importorskip("tokenizers", reason="needs the extra text: pip install tenzoo[text]")
    settings = {name: path for name in ("train", "validation", "test") if name in given} | {
        "batch_size": 2,
        "context": 64,
    }
    arguments = [word for name, value in settings.items() for word in (f"--data.init_args.{name}", str(value))]
    return [*arguments, "--trainer.val_check_interval", "1.0"]


def compressed(folder, root):
    """What ``tenzoo compress`` makes of random weights, in place of a published file, as arguments."""
    torch.save(CIFARResNet(20).state_dict(), folder / "dense.pt")
    target = folder / "compressed"
    data = ["--calibration.root", root, "--calibration_size", "8", "--calibration.batch_size", "8"]
    files = ["--weights", str(folder / "dense.pt"), "--output", str(target)]
    assert main(["compress", "--config", str(ROOT / "compress" / "tt_resnet20.yaml"), *files, *data]) == 0
    network = "--model.init_args.network.init_args"
    made = [f"{network}.plan", str(target / "plan.json"), f"{network}.weights", str(target / "weights.pt")]
    return [*made, "--model.init_args.teacher_weights", str(folder / "dense.pt")]


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.parametrize("config", MODELS, ids=lambda path: path.stem)
def test_every_model_trains(tmp_path, monkeypatch, capsys, config):
    runs, folder = tmp_path / "runs", tmp_path / "images"
    images = images_of(config)
    arguments = SMALLER.get(config.stem, []) if images is None else small_images(images, folder, monkeypatch)
    if "TextCorpusDataModule" in config.read_text():
        arguments = small_corpus(config, tmp_path / "text.txt")
    if "CompressedNetwork" in config.read_text():
        arguments += compressed(tmp_path, str(folder))
        assert 0.99 < Plan.load(tmp_path / "compressed" / "plan.json").parameters / (269_722 / 2.6) <= 1
    assert fit(runs, config, args=arguments) == 0
    printed = capsys.readouterr().out
    text = config.read_text()
    judged = "validation" if "TextCorpusDataModule" in text and "test:" not in text else "test"
    assert ("held out" if "CompletionDataModule" in text else judged) in printed
    assert "nan" not in printed
    written = {path.name for path in the_run(runs).iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints"} <= written
    assert ("norm_dynamics.png" in written) == ("NormDynamicsMonitor" in config.read_text())


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
@pytest.mark.parametrize("config", ["il2_tucker", "tr_resnet20_cifar10"])
def test_every_method_composes(tmp_path, monkeypatch, capsys, config, method):
    path = ROOT / f"{config}.yaml"
    images = images_of(path)
    short = [] if images is None else [ROOT / "schedules" / "short_cifar10.yaml"]
    arguments = [] if images is None else small_images(images, tmp_path / "images", monkeypatch)
    assert fit(tmp_path / "runs", path, *short, method, args=arguments) == 0
    assert ("held out" if images is None else "test") in capsys.readouterr().out
