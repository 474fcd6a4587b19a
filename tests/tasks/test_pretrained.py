"""Trained tasks as folders: what is loaded is what was saved, whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenzoo.models import CIFARResNet, Decoder
from tenzoo.tasks import CausalLMTask, CompletionTask, ImageClassificationTask, Task
from tenzoo.tasks.pretrained import WEIGHTS
from tenzoo.zoo import load_task
from tests.cli.own_task import OwnTask

IMAGES = torch.randn(2, 3, 32, 32)


def network():
    return CIFARResNet(20, factorization="tt", rank=2)


def test_a_task_of_a_config_comes_back_whole(tmp_path):
    task = load_task("tr_resnet20_cifar10")
    with torch.no_grad():
        for buffer in task.network.buffers():
            buffer.add_(1)
    task.save_pretrained(tmp_path / "new")
    for kind in (Task, ImageClassificationTask):
        again = kind.from_pretrained(tmp_path / "new")
        assert type(again) is ImageClassificationTask
        assert not again.training
        assert torch.equal(again.network(IMAGES), task.network.eval()(IMAGES))
        assert again.hparams["network"] == task.hparams["network"]
    assert "55,826 parameters" in (tmp_path / "new" / "README.md").read_text()


def test_objects_are_given_again(tmp_path):
    task = ImageClassificationTask(network(), label_smoothing=0.1)
    task.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^expected `network` for .*, got none"):
        Task.from_pretrained(tmp_path)
    again = ImageClassificationTask.from_pretrained(tmp_path, network=network())
    assert again.hparams["label_smoothing"] == 0.1
    assert torch.equal(again.network(IMAGES), task.network.eval()(IMAGES))


def test_a_completion_keeps_its_shape_and_units(tmp_path):
    task = CompletionTask("tucker", [2, 2, 2], shape=[4, 5, 6])
    task.model.location.fill_(3.0)
    task.model.scale.fill_(2.0)
    task.save_pretrained(tmp_path)
    index = torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert torch.equal(Task.from_pretrained(tmp_path)(index), task(index))


def test_a_tied_head_is_saved_once(tmp_path):
    task = CausalLMTask(Decoder(20, width=16, heads=2, depth=1, context=8, factorization="tt", rank=2))
    task.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert len(load_file(tmp_path / WEIGHTS)) + len(settings["alike"]) == len(task.state_dict())
    own = Decoder(20, width=16, heads=2, depth=1, context=8, factorization="tt", rank=2)
    again = CausalLMTask.from_pretrained(tmp_path, network=own)
    tokens = torch.randint(20, (2, 8))
    assert torch.equal(again(tokens), task(tokens))


def test_half_precision_in_the_file(tmp_path):
    task = ImageClassificationTask(network())
    task.save_pretrained(tmp_path, dtype=torch.float16)
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {torch.float16, torch.int64}
    again = Task.from_pretrained(tmp_path, network=network())
    assert next(again.network.parameters()).dtype == torch.float32
    outputs = task.network.eval()(IMAGES)
    assert (again.network(IMAGES) - outputs).norm() < 0.01 * outputs.norm()
    with torch.no_grad():
        next(task.network.parameters()).fill_(1e6)
    with pytest.raises(ValueError, match="expected finite numbers in"):
        task.save_pretrained(tmp_path / "large", dtype=torch.float16)
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize("fault", ["missing", "other shape", "too many", "integers", "nan"])
def test_other_weights_are_refused_and_nothing_is_loaded(tmp_path, fault):
    task = ImageClassificationTask(network())
    task.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    name = "network.linear.weight"
    match fault:
        case "missing":
            del weights[name]
        case "other shape":
            weights[name] = torch.zeros(10, 3)
        case "too many":
            weights["other"] = torch.zeros(3)
        case "integers":
            weights[name] = weights[name].long()
        case "nan":
            weights[name][0, 0] = torch.nan
    save_file(weights, tmp_path / WEIGHTS)
    other = ImageClassificationTask(network())
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=f"'{'other' if fault == 'too many' else name}' in "):
        other.load_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 9}'])
def test_settings_that_are_none(tmp_path, text):
    ImageClassificationTask(network()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        Task.from_pretrained(tmp_path)


def test_a_folder_is_not_overwritten(tmp_path):
    task = ImageClassificationTask(network())
    task.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder without config\.json in `folder`"):
        task.save_pretrained(tmp_path)


def test_classes(tmp_path):
    OwnTask(start=2.0).save_pretrained(tmp_path)
    assert Task.from_pretrained(tmp_path).ratings.weight[0] == 2.0
    with pytest.raises(ValueError, match=r"expected a CompletionTask in .*, got 'tests\.cli\.own_task\.OwnTask'"):
        CompletionTask.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"task": "os.system"}))
    with pytest.raises(ValueError, match="if it is a class of your own, import it first"):
        Task.from_pretrained(tmp_path)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder in `source`"):
        Task.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"without config\.json"):
        Task.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a CompletionTask with weights, got one that is not built yet"):
        CompletionTask("tucker", 2).save_pretrained(tmp_path / "new")
