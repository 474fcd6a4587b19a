"""Files from before the cores of a layer were in ``factorization``: their names become those of today."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from tenzoo.compression import apply_, plan, restore_
from tenzoo.layers import TensorizedLinear, TensorizedWeight
from tenzoo.models import CIFARResNet
from tenzoo.tasks import ImageClassificationTask
from tenzoo.weight_files import load_weights_


def former(state):
    return {name.replace("factorization.cores.", "weight.cores."): value for name, value in state.items()}


def same(first, second):
    return all(value.equal(other) for value, other in zip(first.state_dict().values(), second.values(), strict=True))


def test_a_layer_and_a_parametrization():
    gru = nn.GRU(8, 8)
    cores = TensorizedWeight((24, 8), factorization="tt", rank=2)
    parametrize.register_parametrization(gru, "weight_ih_l0", cores)
    model = nn.ModuleList([TensorizedLinear(8, 8, factorization="cp", rank=2), gru])
    state = {name: torch.rand_like(value) for name, value in model.state_dict().items()}
    assert any(name.endswith("weight_ih_l0.0.weight.cores.0") for name in former(state))
    model.load_state_dict(former(state))
    assert same(model, state)


def test_a_file_of_weights(tmp_path):
    network = CIFARResNet(20, factorization="tr", rank=2)
    state = {name: value + 1 for name, value in network.state_dict().items()}
    torch.save({"state_dict": {f"network.{name}": value for name, value in former(state).items()}}, tmp_path / "w.pt")
    assert same(load_weights_(network, tmp_path / "w.pt"), state)


def test_a_compressed_model():
    model, other = (nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)) for _ in range(2))
    made = plan(model, factorization="tt", ranks=8)
    state = apply_(model, made).state_dict()
    assert same(restore_(other, made, former(state)), state)


def test_a_checkpoint_of_a_task():
    tasks = [ImageClassificationTask(CIFARResNet(20, factorization="cp", rank=2)) for _ in range(2)]
    checkpoint = {"state_dict": former(tasks[0].state_dict())}
    tasks[1].on_load_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == tasks[1].state_dict().keys()
