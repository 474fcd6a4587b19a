import math

import pytest
import torch
import yaml
from torch import nn

from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.cli import main
from tenzoo.cores import find_core_groups
from tenzoo.layers import TensorizedLinear
from tenzoo.models import CIFARResNet
from tenzoo.tasks import SAM, DistillationTask, ImageClassificationTask
from tests.runs import runs
from tests.tasks.test_classification import Batches, fit, small
from tests.tasks.test_classification_cli import NETWORK, config  # noqa: F401  (a fixture)
from tests.tasks.toy import assert_same_weights, sgd


class Teacher(nn.Module):
    """Counts its calls, and would notice another mode or a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(
            nn.Flatten(), TensorizedLinear(48, 5, factorization="cp", rank=2), nn.BatchNorm1d(5), nn.Dropout(0.5)
        )
        self.calls = 0

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        return 3 * self.layers(images)


def task(network=None, **kwargs):
    defaults = {"optimizer": sgd(0.1), "teacher": Teacher(), "num_classes": 5}
    return DistillationTask(network or small(), **(defaults | kwargs))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_that_of_the_paper(share, temperature):
    """Cross-entropies written out; the divergence is the one to the softened targets less the targets' entropy."""
    teacher = Teacher().double().eval()
    model = task(
        small().double(), teacher=teacher, teacher_share=share, temperature=temperature, label_smoothing=0.1
    ).eval()
    images, labels = Batches().batches[0]
    images = images.double()
    with torch.no_grad():
        targets = (teacher(images) / temperature).softmax(1)
    logits = model(images)
    softened = (logits / temperature).exp() / (logits / temperature).exp().sum(1, keepdim=True)
    divergence = (targets * (targets.log() - softened.log())).sum(1).mean()
    plain = ImageClassificationTask(model.network, num_classes=5, label_smoothing=0.1).loss((images, labels), 0)
    found = model.loss((images, labels), 0)
    torch.testing.assert_close(found, (1 - share) * plain + share * temperature**2 * divergence)
    assert found.dtype == torch.float64


def test_without_a_share_it_is_the_plain_task():
    plain = ImageClassificationTask(small(seed=2), num_classes=5, optimizer=sgd(0.1))
    taught = task(small(seed=2), teacher_share=0.0)
    fit(plain)
    fit(taught)
    assert_same_weights(plain, taught)


def test_the_network_comes_to_say_what_the_teacher_says():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    model = task(student, teacher=teacher, teacher_share=1.0, optimizer=sgd(0.2))
    fit(model, batches=Batches(sizes=(64, 64)), epochs=200, limit_val_batches=0)
    images, _ = Batches(seed=4).batches[0]
    with torch.no_grad():
        torch.testing.assert_close(student(images).softmax(1), teacher(images).softmax(1), atol=0.02, rtol=0)


@pytest.mark.parametrize("kwargs", [{}, {"sam": SAM(rho=0.1)}])
def test_the_teacher_stays_as_it_is_and_is_asked_once_per_batch(tmp_path, kwargs):
    model = task(**kwargs)
    (teacher,) = model._teacher
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    run = fit(model, callbacks=[DeviationAwareScaling(0.1)] if not kwargs else [])
    assert teacher.calls == 2 * 3
    after = teacher.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())
    assert [group.name for group in find_core_groups(model)] == ["network.2.weight"]
    run.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert not [name for name in stored["state_dict"] if "layers" in name or "teacher" in name]
    assert stored["hyper_parameters"]["temperature"] == 4.0
    assert "teacher" not in stored["hyper_parameters"]
    again = DistillationTask.load_from_checkpoint(
        tmp_path / "x.ckpt", network=small(seed=5), teacher=Teacher(), weights_only=True
    )
    assert_same_weights(model, again)


class Own(DistillationTask):
    """A user's own, for which attributes that a pass assigns are put back."""


def test_what_the_teacher_says_reaches_both_passes_of_a_subclass_too():
    models = []
    for kind in (DistillationTask, Own):
        torch.manual_seed(3)
        model = kind(small(), optimizer=sgd(0.1), teacher=Teacher(), num_classes=5, sam=SAM(rho=0.1))
        fit(model)
        models.append(model)
    assert_same_weights(*models)


def test_the_teacher_follows_the_task():
    model = task()
    (teacher,) = model._teacher
    assert model.double() is model
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float64}
    assert {parameter.device.type for parameter in model.to("meta")._teacher[0].parameters()} == {"meta"}
    model.train()
    assert not teacher.training


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_half_precision(precision):
    run = fit(task(), precision=precision)
    assert run.callback_metrics["train/loss"].isfinite()


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"teacher": "resnet20"}, TypeError, r"nn\.Module in `teacher`, got str"),
        ({"teacher_share": 1.1}, ValueError, r"\[0, 1\] in `teacher_share`, got 1\.1"),
        ({"teacher_share": math.nan}, ValueError, "`teacher_share`, got nan"),
        ({"temperature": 0.0}, ValueError, r"finite number > 0 in `temperature`, got 0\.0"),
        ({"temperature": math.inf}, ValueError, "`temperature`, got inf"),
        ({"teacher_weights": "none.pt"}, FileNotFoundError, r"existing file in `teacher_weights`, got 'none\.pt'"),
        ({"teacher_weights": ""}, FileNotFoundError, "existing file in `teacher_weights`, got ''"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        task(**kwargs)


def test_a_teacher_of_other_classes():
    with pytest.raises(ValueError, match=r"shape \(N, 5\) from `teacher` for N = 8 images, got \(8, 48\)"):
        fit(task(teacher=nn.Flatten()))


def test_the_callers_teacher_is_copied():
    """So it can be trained, used as a teacher again, or be the network as it was."""
    network = small()
    model = task(network, teacher=network)
    assert all(parameter.requires_grad for parameter in network.parameters())
    before = [parameter.detach().clone() for parameter in model._teacher[0].parameters()]
    fit(model)
    after = list(model._teacher[0].parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert not any(torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_from_the_command_line_with_a_file_of_weights(tmp_path, config):  # noqa: F811
    torch.manual_seed(3)
    teacher = CIFARResNet(20, num_classes=5)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    settings = yaml.safe_load(config.read_text())
    settings["model"]["class_path"] = "tenzoo.tasks.DistillationTask"
    settings["model"]["init_args"] |= {
        "teacher": {"class_path": "tenzoo.models.CIFARResNet", "init_args": {"depth": 20, "num_classes": 5}},
        "teacher_weights": str(tmp_path / "teacher.pt"),
        "temperature": 2.0,
    }
    config.write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(config)]) == 0
    checkpoint = torch.load(runs(config.parent / "runs")[0] / "checkpoints" / "end.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["teacher_weights"] == str(tmp_path / "teacher.pt")
    assert checkpoint["hyper_parameters"]["network"]["init_args"].items() >= NETWORK.items()
