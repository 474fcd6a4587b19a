"""Taking over published weights, and refusing what is none."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tenzoo.models import CIFARResNet
from tests.hostile import Bomb
from tests.models.test_resnet import with_statistics


def write(network, path):
    """A file in the published format."""
    state = {f"module.{key}": value for key, value in network.state_dict().items() if "num_batches" not in key}
    torch.save({"state_dict": state, "best_prec1": 91.0}, path)
    return path


def test_a_published_file_is_taken_over(tmp_path):
    other = with_statistics(CIFARResNet(20))
    network = CIFARResNet(20).eval()
    assert network.load_pretrained(write(other, tmp_path / "resnet20.th")) is network
    images = torch.randn(2, 3, 32, 32)
    assert network(images).equal(other(images))


def test_a_plain_state_dict_is_taken_over(tmp_path):
    other = with_statistics(CIFARResNet(20))
    torch.save(other.state_dict(), tmp_path / "mine.pt")
    network = CIFARResNet(20).load_pretrained(tmp_path / "mine.pt")
    assert all(value.equal(other.state_dict()[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("text", "torch can load without running code"),
        ("code", "torch can load without running code"),
        ("tensor", "dictionary with a `state_dict` of tensors"),
        ("numbers", "dictionary with a `state_dict` of tensors"),
        (
            "empty",
            r"weights of this CIFARResNet in .*, got 'conv1\.weight' of no shape where .* has shape \(16, 3, 3, 3\)",
        ),
        ("depth", r"expected the weights of a ResNet-20 in .*, got those of a ResNet-32$"),
        ("classes", r"'linear\.weight' of shape \(100, 64\) where the network has shape \(10, 64\)"),
    ],
)
def test_a_wrong_file(tmp_path, content, match):
    path, trap = tmp_path / "weights.th", tmp_path / "trap"
    match content:
        case "text":
            path.write_text("weights")
        case "code":
            torch.save({"state_dict": {}, "extra": Bomb(trap)}, path)
        case "tensor":
            torch.save(torch.ones(3), path)
        case "numbers":
            torch.save({"state_dict": {"a": 1}}, path)
        case "empty":
            torch.save({"state_dict": {}}, path)
        case "depth":
            write(CIFARResNet(32), path)
        case "classes":
            write(CIFARResNet(20, num_classes=100), path)
    network = CIFARResNet(20)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=match) as caught:
        network.load_pretrained(path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"existing file of weights, got '.*nowhere\.th'"):
        CIFARResNet(20).load_pretrained(tmp_path / "nowhere.th")


def test_dense_weights_do_not_fit_cores(tmp_path):
    path = write(CIFARResNet(20), tmp_path / "resnet20.th")
    with pytest.raises(ValueError, match=r"expected a dense network to load .*, got a tensorized one"):
        CIFARResNet(20, factorization="cp", rank=2).load_pretrained(path)


@pytest.mark.slow
@pytest.mark.skipif(
    not {"TENZOO_CIFAR10", "TENZOO_RESNET_CIFAR10"} <= set(os.environ),
    reason="needs two directories: the images in TENZOO_CIFAR10, the published weights in TENZOO_RESNET_CIFAR10",
)
@pytest.mark.parametrize(("depth", "correct"), [(20, 9173), (32, 9263)])
@torch.inference_mode()
def test_accuracy_of_the_published_weights(depth, correct):
    root = Path(os.environ["TENZOO_CIFAR10"])
    records = np.fromfile(next(root.rglob("test_batch.bin")), dtype=np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32)) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    file = next(Path(os.environ["TENZOO_RESNET_CIFAR10"]).glob(f"resnet{depth}-*.th"))
    network = CIFARResNet(depth).load_pretrained(file).eval()
    predicted = torch.cat([network(batch).argmax(1) for batch in images.split(500)])
    assert len(labels) == 10_000
    assert abs(int((predicted == labels).sum()) - correct) <= 1
