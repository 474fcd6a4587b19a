"""Numbers of a file survive in the types of the network, or are refused by name."""

import math

import pytest
import safetensors.torch
import torch
from torch import nn

from tenzoo.compression import apply_, plan, restore_
from tenzoo.weight_files import load_weights_


class Values(nn.Module):
    """One parameter or one buffer."""

    def __init__(self, value, *, buffer=False):
        super().__init__()
        if buffer:
            self.register_buffer("x", value)
        else:
            self.x = nn.Parameter(value, requires_grad=value.is_floating_point())


def load(model, tmp_path, **weights):
    torch.save(weights, path := tmp_path / "weights.pt")
    return load_weights_(model, path)


@pytest.mark.parametrize(
    ("given", "to", "got"),
    [
        (torch.tensor([1, 2**40]), torch.int32, "1099511627776"),
        (torch.tensor([1, 300]), torch.uint8, "300"),
        (torch.tensor([1, -1], dtype=torch.int8), torch.uint8, "-1"),
        (torch.tensor([1, 2]), torch.bool, "2"),
        (torch.tensor([1, 2**63], dtype=torch.uint64), torch.int64, "9223372036854775808"),
        (torch.tensor([1, -5]), torch.uint64, "-5"),
        (torch.tensor([1.0, 1e300], dtype=torch.float64), torch.float32, r"1e\+300"),
        (torch.tensor([1.0, -1e6]), torch.float16, r"-1000000\.0"),
        (torch.tensor([1.0, 1e6]), torch.float8_e4m3fn, r"1000000\.0"),
        (torch.tensor([1.0, 1e6]), torch.float8_e5m2, r"1000000\.0"),
        (torch.tensor([1.0, 1e300j], dtype=torch.complex128), torch.complex64, r"1e\+300"),
    ],
)
def test_what_the_type_cannot_hold_is_refused(tmp_path, given, to, got):
    model = Values(torch.ones(2).to(to), buffer=True)
    with pytest.raises(ValueError, match=rf"within the range of {to} as 'x' in '.*weights\.pt', got {got}$"):
        load(model, tmp_path, x=given)
    assert model.x.float().real.equal(torch.ones(2)) if not to.is_complex else model.x.equal(torch.ones(2).to(to))


@pytest.mark.parametrize(
    ("given", "to"),
    [
        (torch.tensor([1, 127]), torch.int8),
        (torch.tensor([1, 255]), torch.uint8),
        (torch.tensor([True, False]), torch.int64),
        (torch.tensor([1, 0]), torch.bool),
        (torch.tensor([1, 2**16 - 1]), torch.uint16),
        (torch.tensor([0.1, 1e300], dtype=torch.float64), torch.float64),
        (torch.tensor([0.1, 1e-300], dtype=torch.float64), torch.float32),
        (torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn), torch.float32),
        (torch.tensor([0.5, 448.0]), torch.float8_e4m3fn),
        (torch.tensor([0.5, 8.0]).to(torch.float8_e5m2), torch.float8_e5m2),
        (torch.tensor([0.5, 3e38]), torch.bfloat16),
        (torch.tensor([1.0, 1j]), torch.complex128),
    ],
)
def test_what_the_type_holds_is_loaded(tmp_path, given, to):
    model = load(Values(torch.ones(2).to(to), buffer=True), tmp_path, x=given)
    assert model.x.dtype == to
    wide = torch.complex128 if to.is_complex else torch.float64
    assert model.x.to(wide).equal(given.to(to).to(wide))


def test_a_mask_of_infinities_is_no_weight(tmp_path):
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    assert load(Values(torch.zeros(3, 3), buffer=True), tmp_path, x=mask).x.equal(mask)
    with pytest.raises(ValueError, match=r"expected finite numbers as 'x' in '.*', got -inf"):
        load(Values(torch.zeros(3, 3)), tmp_path, x=mask)


def tied(kind="same"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    match kind:
        case "same":
            model[2].weight = model[0].weight
        case "view":
            model[2].weight = nn.Parameter(model[0].weight.data)
        case "transposed":
            model[2].weight = nn.Parameter(model[0].weight.data.t())
        case "flat":
            flat = torch.randn(2, 8, 8)
            model[0].weight, model[2].weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])
    return model


@pytest.mark.parametrize("kind", ["same", "view", "transposed"])
def test_names_of_one_memory_have_to_agree(tmp_path, kind):
    weights, model = tied(kind).state_dict(), tied(kind)
    assert load(model, tmp_path, **weights)[2].weight.equal(weights["2.weight"])
    before = model[0].weight.detach().clone()
    weights["2.weight"] = weights["2.weight"].clone()
    weights["2.weight"][3, 3] = 7.0
    expected = r"the numbers of '0\.weight', which is in the same memory, as '2\.weight' in '.*', got others"
    with pytest.raises(ValueError, match=expected):
        load(model, tmp_path, **weights)
    assert model[0].weight.equal(before)


def test_names_side_by_side_in_one_memory_are_free(tmp_path):
    weights = {name: torch.randn_like(value) for name, value in tied().state_dict().items()}
    model = load(tied("flat"), tmp_path, **weights)
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())


def test_a_network_without_memory_is_refused(tmp_path):
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="expected a network with memory in `model`, got 'weight' on the meta device"):
        load(model, tmp_path, **nn.Linear(4, 4).state_dict())


def test_a_network_without_shapes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected shapes in `model`, got 'weight', which has none yet; run the model"):
        load(nn.LazyLinear(4), tmp_path, **nn.Linear(4, 4).state_dict())


class Counting(nn.Linear):
    """Keeps a state that is no tensor."""

    def __init__(self):
        super().__init__(4, 4)

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        raise NotImplementedError


def test_a_state_that_is_no_tensor_is_refused(tmp_path):
    expected = "expected a network whose state is tensors in `model`, got a dict as '_extra_state'"
    with pytest.raises(ValueError, match=expected):
        load(Counting(), tmp_path, **nn.Linear(4, 4).state_dict())
    model = nn.Sequential(Counting(), nn.Linear(8, 8))
    made, weights = plan(model, factorization="tt", ranks=2), {}
    with pytest.raises(ValueError, match=r"state is tensors in `model`, got a dict as '0\._extra_state'"):
        restore_(model, made, weights)


def test_the_ending_of_a_file_may_be_in_capitals(tmp_path):
    weights = nn.Linear(4, 4).state_dict()
    safetensors.torch.save_file(weights, path := tmp_path / "WEIGHTS.SAFETENSORS")
    assert load_weights_(nn.Linear(4, 4), path).weight.equal(weights["weight"])


# --- restore_ ------------------------------------------------------------------------------------------------------


def compressed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.LayerNorm(8))
    model[3].weight = model[2].weight
    made = plan(model, factorization="tt", ranks=2)
    return apply_(model, made).state_dict(), made


def dense(device):
    with torch.device(device):
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.LayerNorm(8))
        model[3].weight = model[2].weight
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "0.factorization.cores.0",
            1e300,
            r"range of torch.float32 as '0\.factorization\.cores\.0' in `weights`, got 1e\+300",
        ),
        ("0.factorization.cores.1", math.nan, r"finite numbers as '0\.factorization\.cores\.1' in `weights`, got nan"),
        ("0.bias", math.inf, r"finite numbers as '0\.bias' in `weights`, got inf"),
        ("3.weight", 7.0, r"the numbers of '2\.weight', which is in the same memory, as '3\.weight' in `weights`"),
    ],
)
def test_cores_survive_too(device, name, value, message):
    weights, made = compressed()
    weights[name] = weights[name].double()
    weights[name].view(-1)[0] = value
    model = dense(device)
    with pytest.raises(ValueError, match=message):
        restore_(model, made, weights)
    assert type(model[0]) is nn.Linear
    assert all(parameter.is_meta == (device == "meta") for parameter in model.parameters())
