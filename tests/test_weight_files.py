"""Files of weights in all their forms, and files that are none."""

import copy
import json
import math

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from tenzoo.models import CIFARResNet
from tenzoo.tasks import ImageClassificationTask
from tenzoo.weight_files import load_weights_, read_weights
from tests.hostile import BOMBS, Bomb, little_memory, memory_bomb
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
        ("too large", r"within the range of torch.float32 as '0\.bias' in '.*', got 1e\+300"),
        ("nan", r"finite numbers as '0\.bias' in '.*', got nan"),
        ("infinity", r"finite numbers as '0\.bias' in '.*', got -inf"),
        ("nan in a buffer", r"numbers as '1\.running_var' in '.*', got nan"),
        ("complex for a count", r"'1\.num_batches_tracked' as torch.int64 in '.*', got torch.complex64"),
        ("two networks", "weights of one network in '.*', got those of several, one of them under 'model.'"),
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
        case "too large":
            weights["0.bias"] = torch.tensor([1.0, 2.0, 1e300, 3.0], dtype=torch.float64)
        case "nan" | "infinity":
            weights["0.bias"] = torch.tensor([1.0, 2.0, math.nan if content == "nan" else -math.inf, 3.0])
        case "nan in a buffer":
            weights["1.running_var"][2] = math.nan
        case "complex for a count":
            weights["1.num_batches_tracked"] = torch.tensor(1 + 1j)
        case "two networks":
            weights = {f"{prefix}{name}": value for prefix in ("module.", "model.") for name, value in weights.items()}
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


@pytest.mark.parametrize("kind", BOMBS)
def test_a_file_asks_for_no_more_memory_than_it_is_long(tmp_path, kind):
    memory_bomb(path := tmp_path / "weights.pt", kind)
    words = {"bytearray": "with a bytearray", "buffer": "asks for 5,640,261,632 of memory"}
    reserved = 2**33 if kind == "buffer" else 2**27  # a buffer that nobody wrote to takes addresses only
    with little_memory(reserved), pytest.raises(ValueError, match=words.get(kind, "asks for 268,4")) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).startswith("expected ")


def test_a_tensor_without_numbers(tmp_path):
    torch.save({"w": torch.zeros(3, device="meta")}, path := tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"numbers of 'w' in '.*weights.pt', got a tensor on the meta device"):
        read_weights(path)


@pytest.mark.parametrize("form", ["legacy", "shared", "view", "no tensor"])
def test_what_takes_no_more_is_read(tmp_path, form):
    path, w = tmp_path / "weights.pt", torch.arange(12.0).view(3, 4)
    match form:
        case "legacy":
            torch.save({"w": w}, path, _use_new_zipfile_serialization=False)
        case "shared":
            torch.save({"w": w, "v": w}, path)
        case "view":
            torch.save({"w": w, "t": w.t(), "row": w[1]}, path)
        case "no tensor":
            torch.save({}, path)
    read = read_weights(path)
    assert all(value.equal({"w": w, "v": w, "t": w.t(), "row": w[1]}[name]) for name, value in read.items())
    assert bool(read) == (form != "no tensor")


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x05" + bytes(4)])
def test_a_safetensors_header_beyond_the_file(tmp_path, header):
    (path := tmp_path / "weights.safetensors").write_bytes(header)
    with (
        little_memory(),
        pytest.raises(ValueError, match=r"safetensors file, got '.*weights.safetensors', which is none"),
    ):
        read_weights(path)


@pytest.mark.parametrize("offsets", [[0, 2**40], [8, 16], [4, 0]])
def test_safetensors_offsets_beyond_the_file(tmp_path, offsets):
    size = (offsets[1] - offsets[0]) // 4
    header = json.dumps({"w": {"dtype": "F32", "shape": [abs(size)], "data_offsets": offsets}}).encode()
    (path := tmp_path / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with little_memory(), pytest.raises(ValueError, match=r"which is none or is damaged"):
        read_weights(path)
