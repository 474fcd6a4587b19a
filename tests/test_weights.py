"""Files of weights in all their forms, and files that are none."""

import copy

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from tenzoo.models import CIFARResNet
from tenzoo.tasks import ImageClassificationTask
from tenzoo.weights import load_weights_, read_weights
from tests.hostile import Bomb
from tests.tasks.toy import sgd, trainer


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def same(first, second):
    other = second.state_dict()
    return all(value.equal(other[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("form", ["plain", "nested", "parallel", "compiled", "safetensors", "without counts"])
def test_every_form_of_a_file(tmp_path, form):
    weights = network().state_dict()
    path = tmp_path / "weights.pt"
    match form:
        case "nested":
            torch.save({"state_dict": weights, "epoch": 3}, path)
        case "parallel":
            torch.save({f"module.{name}": value for name, value in weights.items()}, path)
        case "compiled":
            torch.save({f"_orig_mod.{name}": value for name, value in weights.items()}, path)
        case "safetensors":
            safetensors.torch.save_file(weights, path := tmp_path / "weights.safetensors")
        case "without counts":
            torch.save({name: value for name, value in weights.items() if "num_batches" not in name}, path)
        case _:
            torch.save(weights, path)
    assert same(load_weights_(network(1), path), network())


def test_a_checkpoint_of_a_task(tmp_path):
    task = ImageClassificationTask(CIFARResNet(20), optimizer=sgd(0.1))
    run = trainer(max_epochs=0)
    run.strategy.connect(task)
    run.save_checkpoint(tmp_path / "task.ckpt")
    assert same(load_weights_(CIFARResNet(20), tmp_path / "task.ckpt"), task.network)


def test_names_of_torchvision(tmp_path):
    model = torchvision.models.mobilenet_v3_small()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    other = torchvision.models.mobilenet_v3_small()
    assert same(load_weights_(other, tmp_path / "weights.pth"), model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("another shape", r"got '3\.weight' of shape \(6, 16\) where the network has shape \(5, 16\)"),
        ("one more", r"got 'extra' of shape \(1,\) where the network has no shape"),
        ("one less", r"got '0\.bias' of no shape where the network has shape \(4,\)"),
        ("complex", r"'0\.weight' as torch.float32 in '.*', got torch.complex64"),
        ("integers", r"'0\.weight' as torch.float32 in '.*', got torch.int64"),
        ("broken safetensors", "expected a safetensors file, got '.*', which is none or is damaged"),
        ("code", "torch can load without running code"),
    ],
)
def test_what_is_refused(tmp_path, content, message):
    weights, path, trap = network().state_dict(), tmp_path / "weights.pt", tmp_path / "trap"
    match content:
        case "another shape":
            weights["3.weight"] = torch.zeros(6, 16)
        case "one more":
            weights["extra"] = torch.zeros(1)
        case "one less":
            del weights["0.bias"]
        case "complex" | "integers":
            weights["0.weight"] = weights["0.weight"].to(torch.complex64 if content == "complex" else torch.int64)
        case "code":
            weights["bomb"] = Bomb(trap)
    torch.save(weights, path)
    if content == "broken safetensors":
        path = path.rename(tmp_path / "weights.safetensors")
    model = network(1)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights_(model, path)
    assert "\n" not in str(caught.value)
    assert same(model, before)
    assert not trap.exists()


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"existing file of weights, got '.*nowhere\.pt'"):
        read_weights(tmp_path / "nowhere.pt")
