import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from tenzoo.data import AsymmetricNoise, CIFAR10DataModule, HumanNoise, MatrixNoise, SymmetricNoise
from tests.data.small_cifar10 import numbers, ready


def test_split_is_chosen_by_the_seed(root):
    state = torch.get_rng_state()
    data, other = ready(root), ready(root, seed=1)
    train, val = numbers(data.splits["train"]), numbers(data.splits["val"])
    assert (len(train), len(val)) == (90, 10)
    assert sorted(train + val) == list(range(100))
    assert train == sorted(train)
    assert numbers(ready(root).splits["val"]) == val != numbers(other.splits["val"])
    assert numbers(data.splits["test"]) == numbers(other.splits["test"]) == list(range(100, 120))
    assert torch.equal(torch.get_rng_state(), state)


def test_setup_begins_a_new_stream(root):
    data = ready(root)
    loader = data.train_dataloader()
    next(iter(loader))
    assert data.train_dataloader() is loader
    data.setup()
    assert data.train_dataloader().state_dict() == {"permutation": 0, "batch": 0}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"root": Path("x")}, TypeError, "path as str in `root`"),
        ({"batch_size": 0}, ValueError, "at least 1 in `batch_size`"),
        ({"batch_size": None}, TypeError, "integer in `batch_size`"),
        ({"validation_size": -1}, ValueError, "at least 0 in `validation_size`"),
        ({"validation_size": 0.1}, TypeError, "integer in `validation_size`"),
        ({"seed": -1}, ValueError, "at least 0 in `seed`"),
        ({"seed": True}, TypeError, "integer in `seed`"),
        ({"augment": 1}, TypeError, "bool in `augment`"),
        ({"noisy_validation": "no"}, TypeError, "bool in `noisy_validation`"),
        ({"download": None}, TypeError, "bool in `download`"),
        ({"normalization": "cifar"}, ValueError, "one of cifar10, imagenet in `normalization`, got 'cifar'"),
        ({"noise": 1.01}, ValueError, r"\[0, 1\] in `noise`, got 1.01"),
        ({"noise": -1}, ValueError, r"\[0, 1\] in `noise`, got -1"),
        ({"noise": "symmetric"}, TypeError, "LabelNoise, a rate or None in `noise`"),
    ],
)
def test_bad_arguments_are_refused_at_construction(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        CIFAR10DataModule(**changes)
    assert "\n" not in str(caught.value)


def test_a_validation_set_that_leaves_nothing_is_refused_in_setup(root):
    assert len(ready(root, validation_size=99).splits["train"]) == 1
    with pytest.raises(ValueError, match="less than the 100 training images in `validation_size`, got 100"):
        ready(root, validation_size=100)


def test_a_label_file_of_another_length_is_refused_in_setup(root, tmp_path):
    np.savez(tmp_path / "n.npz", worse_label=np.zeros(99, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"expected 100 labels as 'worse_label' in the file in `path`, .* got 99"):
        ready(root, noise=HumanNoise(str(tmp_path / "n.npz")))


def test_attributes_before_setup():
    data = CIFAR10DataModule()
    assert data.state_dict() == {}
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        _ = data.noise_rate


def test_noise_is_in_train_only_and_its_rate_is_the_actual_one(root):
    clean, noisy = ready(root), ready(root, noise=0.5)
    train = noisy.splits["train"]
    assert torch.equal(noisy.clean_train_labels, clean.splits["train"].label)
    wrong = sum(a != b for a, b in zip(train.label.tolist(), clean.splits["train"].label.tolist(), strict=True))
    assert noisy.noise_rate == wrong / 90
    assert 0.3 < noisy.noise_rate < 0.7
    assert type(noisy.noise_rate) is float
    assert clean.noise_rate == 0.0
    for name in ("val", "test"):
        assert torch.equal(noisy.splits[name].label, clean.splits[name].label)
    assert torch.equal(train.image, clean.splits["train"].image)


def test_noise_in_validation_where_it_is_asked_for(root):
    clean, noisy = ready(root), ready(root, noise=1.0, noisy_validation=True)
    assert (noisy.splits["val"].label != clean.splits["val"].label).all()
    assert torch.equal(noisy.splits["test"].label, clean.splits["test"].label)
    assert noisy.noise_rate == 1.0


def test_the_split_does_not_change_an_images_label(root):
    def labels(**changes):
        splits = ready(root, noise=0.5, noisy_validation=True, **changes).splits
        parts = [part for name, part in splits.items() if name != "test"]
        return {image: label for part in parts for image, label in zip(numbers(part), part.label.tolist(), strict=True)}

    assert labels() == labels(validation_size=60) == labels(validation_size=0)
    assert labels() != labels(seed=1)


def test_noise_is_reported_once(root, caplog):
    with caplog.at_level(logging.INFO):
        data = ready(root, noise=AsymmetricNoise(0.8))
        data.setup("test")
        ready(root)
    (message,) = [record.getMessage() for record in caplog.records if "label noise" in record.getMessage()]
    assert message.startswith(f"label noise AsymmetricNoise(rate=0.8): {data.noise_rate:.2%} of 90 training labels")


def test_human_labels(root, tmp_path):
    clean = np.tile(np.arange(10, dtype=np.uint8), 10)
    np.savez(tmp_path / "n.npz", clean_label=clean, aggre_label=(clean + 1) % 10)
    data = ready(root, noise=HumanNoise(str(tmp_path / "n.npz"), "aggre_label"))
    assert torch.equal(data.splits["train"].label, (data.clean_train_labels + 1) % 10)
    assert data.noise_rate == 1.0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"validation_size": 11}, "validation_size"),
        ({"noise": 0.4}, "noise"),
        ({"noise": SymmetricNoise(0.2), "noisy_validation": True}, "noisy_validation"),
        ({"noise": MatrixNoise(np.eye(10))}, "noise"),
        ({"noise": None}, "noise"),
        ({"normalization": "imagenet"}, "normalization"),
    ],
)
def test_state_of_other_data_is_refused(root, changes, field):
    state = ready(root, noise=0.2).state_dict()
    ready(root, noise=SymmetricNoise(0.2), batch_size=3, augment=False).load_state_dict(state)
    with pytest.raises(ValueError, match=f"expected the `{field}` of the checkpoint") as caught:
        ready(root, **{"noise": 0.2, **changes}).load_state_dict(state)
    assert "\n" not in str(caught.value)


def test_state_of_other_labels_is_refused(root, tmp_path):
    clean = np.tile(np.arange(10, dtype=np.uint8), 10)
    states = []
    for shift in (1, 2):
        np.savez(tmp_path / f"{shift}.npz", worse_label=(clean + shift) % 10)
        states.append(ready(root, noise=HumanNoise(str(tmp_path / f"{shift}.npz"))).state_dict())
    with pytest.raises(ValueError, match="expected the `checksum` of the checkpoint"):
        ready(root, noise=HumanNoise(str(tmp_path / "1.npz"))).load_state_dict(states[1])
