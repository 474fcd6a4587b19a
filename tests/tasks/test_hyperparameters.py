"""The arguments of a task are saved, however its class and its base classes take them."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
from torch import nn

from tenzoo.tasks import SAM, CompletionTask, ImageClassificationTask, Task
from tests.tasks.toy import Batches, Regression, trainer


class Fixed(CompletionTask):
    """Fixes an argument of its base class, and saves nothing itself."""

    def __init__(self, gain, *, labels=("a",), **kwargs):
        super().__init__("cp", 3, **kwargs)
        self.gain = gain


class Saving(Regression):
    """Saves in the constructor, and uses what was saved."""

    def __init__(self, width: int = 3, slope: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.first = nn.Linear(self.hparams.width, 1)


class Wider(Saving):
    """Fixes what its base class saves under that name."""

    def __init__(self, depth: int, network: nn.Module | None = None):
        super().__init__(depth + 1, slope=0.5, optimizer=torch.optim.SGD)


class Plain(Task):
    """Saves nothing."""

    def loss(self, batch, batch_idx):
        raise NotImplementedError


class Named(Plain):
    def __init__(self, a, b, c=3):
        super().__init__()
        self.save_hyperparameters("a", "c")


class Without(Saving):
    def __init__(self, secret: str, width: int = 2):
        super().__init__(width)
        self.save_hyperparameters(ignore="secret")


class Mapped(Plain):
    def __init__(self, settings):
        super().__init__()
        self.save_hyperparameters({**settings, "module": nn.ReLU}, logger=False)


def test_positional_arguments_defaults_and_subclasses():
    task = Fixed(0.5, shape=[3, 4, 2], sam=SAM(0.1), optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    assert dict(task.hparams) == {
        "gain": 0.5,
        "labels": ("a",),
        "shape": [3, 4, 2],
        "sam": {"rho": 0.1, "adaptive": False, "scope": "all", "sync_ascent": True},
        "factorization": "cp",
        "rank": 3,
        "init_std": 1.0,
        "init": "normal",
        "reduction": "mean",
        "biases": False,
        "core_weight_decay": None,
        "bias_weight_decay": None,
        "search_minutes": 5.0,
        "interactions": None,
        "clip": None,
        "smoothness": None,
        "ensemble": 1,
    }


def test_a_base_class_finds_its_own_arguments():
    task = Wider(4, nn.Linear(2, 2))
    assert task.first.in_features == 5
    assert dict(task.hparams) == {"depth": 4, "width": 5, "slope": 0.5, "norm": False, "dropout": 0.0}


def test_calls_of_ones_own():
    assert dict(Named(1, 2).hparams) == {"a": 1, "c": 3}
    assert "secret" not in Without("x").hparams
    assert Without("x", 7).first.in_features == 7
    assert dict(Mapped({"x": 1}).hparams) == {"x": 1}


def test_no_argument_is_kept_alive():
    given = nn.Linear(2, 2)
    task = Wider(4, given)
    assert all(value is not given for value in task.__dict__["_constructor_arguments"].values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_copies_keep_them(copied):
    assert copied(Wider(4)).hparams == Wider(4).hparams


def test_a_checkpoint_of_a_subclass_loads(tmp_path):
    task = Without("x", 7)
    judge = trainer(tmp_path, max_epochs=1)
    judge.fit(task, Batches(), Batches())
    judge.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]["width"] == 7
    assert Without.load_from_checkpoint(tmp_path / "x.ckpt", secret="y").first.in_features == 7


def test_the_signature_and_the_errors_of_a_constructor_are_its_own():
    assert list(inspect.signature(ImageClassificationTask).parameters)[:2] == ["network", "num_classes"]
    with pytest.raises(TypeError, match=r"Named.__init__\(\) missing 1 required positional argument: 'b'"):
        Named(1)
