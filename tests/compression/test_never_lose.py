"""Calibration never makes a plan worse: of two plans the one is taken that moves the network's outputs less."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tenzoo.compression import Plan, apply_, plan
from tenzoo.compression.calls import Call, hold_back
from tenzoo.compression.samples import divided


def network(seed: int, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 24), nn.Tanh(), nn.Linear(24, width), nn.Tanh(), nn.Linear(width, 5))


def error(model: nn.Module, made: Plan, inputs: torch.Tensor, calibration: torch.Tensor | None) -> float:
    """Of the compressed model's outputs, measured from outside."""
    small = apply_(copy.deepcopy(model), made, calibration=calibration)
    with torch.no_grad():
        return ((small(inputs) - model(inputs)).norm() / model(inputs).norm()).item()


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    samples=st.integers(2, 40),
    spread=st.floats(0, 3),
    factorization=st.sampled_from(["tt", "cp", "tucker"]),
    budget=st.sampled_from([0.4, 0.6, 0.8]),
)
def test_a_calibrated_plan_is_no_worse_than_a_plain_one_on_inputs_held_back(
    seed, samples, spread, factorization, budget
):
    model = network(seed)
    scales = torch.exp(spread * torch.randn(16))
    inputs = torch.randn(samples, 16) * scales
    held = inputs[samples - max(samples // 4, 1) :]
    made = plan(model, factorization=factorization, budget=budget, calibration=inputs)
    plain = plan(model, factorization=factorization, budget=budget)
    found = error(model, made, held, inputs)
    assert found == pytest.approx(made.output_error, rel=1e-3, abs=1e-6)
    assert found <= error(model, plain, held, None) * (1 + 1e-3) + 1e-6
    assert made.parameters <= budget * made.dense_parameters


def test_inputs_that_mislead_are_not_followed():
    """One direction in what decides, another in what judges: keeping the first's outputs would lose the second's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    inputs = torch.zeros(40, 16)
    inputs[:30, :8] = torch.randn(30, 8)
    inputs[30:, 8:] = torch.randn(10, 8)
    made = plan(model, factorization="tt", ranks=6, calibration=inputs)
    assert made.keeps == "weights"
    plain = plan(model, factorization="tt", ranks=6)
    assert made.layers == plain.layers
    compressed, reference = (
        apply_(copy.deepcopy(model), each, calibration=data) for each, data in ((made, inputs), (plain, None))
    )
    assert compressed[0].to_dense().weight.equal(reference[0].to_dense().weight)
    followed = replace(made, keeps="outputs")
    assert error(model, followed, inputs[30:], inputs) > 1.5 * error(model, made, inputs[30:], inputs)


def test_inputs_that_lead_are_followed_and_it_is_said():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    inputs = torch.randn(40, 16) * torch.logspace(0, -3, 16)
    made = plan(model, factorization="tt", ranks=6, calibration=inputs)
    assert made.keeps == "outputs"
    assert "keeps the outputs; error of the network's outputs on inputs held back: 0.0" in " ".join(str(made).split())
    assert made.output_error < 0.5 * error(model, plan(model, factorization="tt", ranks=6), inputs[30:], None)


def test_a_plan_says_what_it_keeps_on_disk_and_older_ones_kept_the_outputs(tmp_path):
    model = network(0)
    inputs = torch.randn(8, 16)
    made = plan(model, factorization="tt", budget=0.6, calibration=inputs)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    content = json.loads((tmp_path / "plan.json").read_text())
    del content["keeps"], content["output_error"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert Plan.load(tmp_path / "old.json").by_outputs
    assert not plan(model, factorization="tt", budget=0.6).by_outputs
    for wrong in ({"keeps": "all"}, {"output_error": -1.0}, {"keeps": None}):
        (tmp_path / "bad.json").write_text(json.dumps({**content, "output_error": 0.1, "keeps": "outputs", **wrong}))
        with pytest.raises(ValueError, match="expected a plan"):
            Plan.load(tmp_path / "bad.json")


def test_held_back_samples_are_the_last_ones():
    calls = [Call((torch.arange(float(n)).view(-1, 1) + 10 * n,), {}) for n in (3, 4)]
    first, last = hold_back(calls, partial(divided, nn.Identity(), argument="calibration"))
    assert torch.cat([call.args[0] for call in first]).flatten().tolist() == [30, 31, 32, 40, 41, 42]
    assert torch.cat([call.args[0] for call in last]).flatten().tolist() == [43]
    one = [Call((torch.ones(1, 2),), {})]
    assert hold_back(one, lambda call, border: None) == (one, one)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((8,), ([8], [8])),
        ((5, 3), ([5], [3])),
        ((3, 5), ([3], [5])),
        ((2, 2, 4), ([2, 2], [4])),
        ((4, 3, 1), ([4], [3, 1])),
    ],
)
def test_calls_that_cannot_be_divided_are_on_one_side(sizes, expected):
    calls = [Call((torch.ones(size, 1),), {}) for size in sizes]
    first, last = hold_back(calls, lambda call, border: None)
    assert ([call.size for call in first], [call.size for call in last]) == expected
