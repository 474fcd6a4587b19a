"""A plan is carried out as it was made: one that was altered, however well its numbers agree, is refused by name."""

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from tenzoo.compression import Plan, apply_, plan, restore_
from tenzoo.factorizations import FACTORIZATIONS
from tests.compression.test_plan import IMAGES
from tests.compression.test_plan import network as convolutions
from tests.compression.test_restore import Mixed
from tests.factorizations.formats import NAMES


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 10), nn.Linear(10, 3))


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def made():
    return plan(network(), factorization="tt", ranks={"0": 8, "3": 2}, example_input=X)


def edited(found, name, **changes):
    return replace(found, layers=tuple(replace(one, **changes) if one.name == name else one for one in found.layers))


def without(found, name):
    layers = tuple(layer for layer in found.layers if layer.name != name)
    gone = next(layer for layer in found.layers if layer.name == name)
    return replace(found, layers=layers, other_parameters=found.other_parameters + gone.dense_parameters)


ALTERED = {
    "rank beyond the matrix": (
        lambda found: edited(found, "0", rank=(100,), parameters=2 * 64 * 100 + 64),
        r"\[100\] as the rank of '0', where the most that are of use are \[64\]",
    ),
    "another count of cores": (
        lambda found: edited(found, "0", parameters=1000),
        r"1000 parameters of '0', where rank \[8\] makes 1088",
    ),
    "both counts of a layer": (
        lambda found: edited(found, "0", parameters=1088 + 7, dense_parameters=4160 + 7),
        r"4167 dense_parameters of '0', where the model has 4160",
    ),
    "both counts of a dense layer": (
        lambda found: edited(found, "4", parameters=40, dense_parameters=40),
        r"40 dense_parameters of '4', where the model has 33",
    ),
    "no rank": (
        lambda found: edited(found, "0", rank=None),
        r"1088 parameters of '0', where the dense layer has 4160",
    ),
    "everything else": (
        lambda found: replace(found, other_parameters=5),
        r"5 other_parameters, where the model has 128",
    ),
    "multiplications of a dense layer": (
        lambda found: edited(found, "4", multiplications=3),
        r"3 multiplications of '4', where the dense layer has 30",
    ),
    "multiplications of nothing": (
        lambda found: edited(found, "0", dense_multiplications=None),
        r"1024 multiplications of '0', where the dense layer has None",
    ),
    "a layer left out": (lambda found: without(found, "0"), "no layer '0', which the model has"),
    "a dense layer left out": (lambda found: without(found, "4"), "no layer '4', which the model has"),
    "no layers": (lambda found: replace(found, layers=()), "no layer '0', which the model has"),
}


@pytest.mark.parametrize("kind", ALTERED)
def test_what_was_altered_is_named(kind):
    alter, message = ALTERED[kind]
    found = made()
    weights = apply_(network(), found).state_dict()
    for use in (lambda model, it: apply_(model, it), lambda model, it: restore_(model, it, weights)):
        model = network()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=rf"expected a plan as it was made for `model` in `plan`, got {message}"):
            use(model, alter(found))
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_dense_layer_that_the_model_lacks_is_named():
    with pytest.raises(ValueError, match="expected the planned layer '4' in `model`, got a model without it"):
        apply_(network()[:4], made())


@pytest.mark.parametrize(
    "change",
    [{"rank": None}, {"rank": None, "factorization": None, "tensorization": None, "parameters": 4160, "error": 0.0}],
)
def test_a_layer_without_a_rank_is_dense_for_a_reason(tmp_path, change):
    made().save(path := tmp_path / "plan.json")
    content = json.loads(path.read_text())
    content["layers"][0].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"expected a plan, as Plan.save writes it, in '.*plan\.json'"):
        Plan.load(path)


def test_layers_are_a_list(tmp_path):
    made().save(path := tmp_path / "plan.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": {}}))
    with pytest.raises(ValueError, match=r"expected a plan, as Plan.save writes it, in '.*plan\.json'"):
        Plan.load(path)


# --- plans that were made are taken --------------------------------------------------------------------------------


class Tied(nn.Module):
    """A head that shares its weight with the embedding, layers that share a bias, and one that is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(40, 24), nn.Linear(24, 40)
        self.head.weight = self.embedding.weight
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.second.bias = self.first.bias
        self.blocks = nn.ModuleList([self.first, self.second, self.first])
        self.grouped = nn.Conv1d(24, 24, 3, groups=2, padding=1)

    def forward(self, x):
        y = self.embedding(x)
        for block in self.blocks:
            y = block(y)
        return self.head(self.grouped(y.mT).mT)


MODELS = {
    "mixed": (lambda: Mixed().eval(), lambda: torch.randn(3, 5, 8)),
    "tied": (lambda: Tied().eval(), lambda: torch.randint(40, (2, 6))),
    "transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval(),
        lambda: torch.randn(2, 3, 16),
    ),
    "convolutions": (convolutions, lambda: IMAGES),
}
AMOUNTS = {"budget": {"budget": 0.8}, "ranks": {"ranks": 3}, "fraction": {"ranks": 0.5}}


def carried_out(tmp_path, name, **arguments):
    make, inputs = MODELS[name]
    found = plan(make(), example_input=inputs(), **arguments)
    found.save(path := tmp_path / "plan.json")
    weights = apply_(small := make(), Plan.load(path)).state_dict()
    assert sum(parameter.numel() for parameter in small.parameters()) == found.parameters
    assert restore_(make(), found, weights).state_dict().keys() == weights.keys()


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("factorization", NAMES)
@pytest.mark.parametrize("amount", AMOUNTS)
def test_what_was_made_is_carried_out(tmp_path, name, factorization, amount):
    carried_out(tmp_path, name, factorization=factorization, **AMOUNTS[amount])


@pytest.mark.parametrize("factorization", ["tt", "tucker"])
def test_what_was_made_within_multiplications_is_carried_out(tmp_path, factorization):
    carried_out(tmp_path, "convolutions", factorization=factorization, budget=0.8, count="multiplications")


def test_a_format_of_another_module_is_read_in_another_process(tmp_path, monkeypatch):
    (tmp_path / "written_formats.py").write_text(
        "from tenzoo.factorizations import Factorization\n"
        "class Star(Factorization):\n"
        "    name = 'written_star'\n"
        "    @staticmethod\n"
        "    def legs(order):\n"
        "        return [(mode, 'r') for mode in range(order)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "plan.json"
    made = plan(nn.Sequential(nn.Linear(64, 64)), factorization="written_formats.Star", budget=0.5)
    made.save(path)
    assert Plan.load(path) == made
    del FACTORIZATIONS["written_star"]
    monkeypatch.delitem(sys.modules, "written_formats")  # as in another process
    assert Plan.load(path).layers[0].factorization == "written_star"
    text = path.read_text()
    for unknown in ("unwritten.Star", "tensor"):
        path.write_text(text.replace("written_formats.Star", unknown))
        with pytest.raises(ValueError, match=rf"expected formats that are defined in '.*', got '{unknown}' for '0'"):
            Plan.load(path)
    del FACTORIZATIONS["written_star"]
