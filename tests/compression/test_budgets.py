"""What a budget counts, and what is in the way of one that cannot be met."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tenzoo.compression import apply_, plan

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


# --- multiplications -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factorization", ["tt", "tucker"])
def test_multiplications_are_those_of_a_sample_whatever_the_batch(factorization):
    model = convolutional()
    made = [
        plan(model, factorization=factorization, budget=0.5, count="multiplications", example_input=IMAGES[:number])
        for number in (1, 8)
    ]
    assert made[0] == made[1]
    pixels = 16 * 16
    assert made[0].dense_multiplications == pixels * 9 * (3 * 32 + 32 * 32) + 320
    assert made[0].multiplications <= 0.5 * made[0].dense_multiplications
    middle = made[0].layers[1]
    if factorization == "tucker":  # channels in, kernel, channels out
        out, kernel, in_ = middle.rank
        least = pixels * (32 * in_ + in_ * kernel * out + out * 32)
        assert middle.multiplications >= least
    apply_(model, made[0], example_input=IMAGES[:1])


def test_an_absolute_budget_is_that_of_a_sample():
    made = plan(convolutional(), factorization="tt", budget=1_600_000, count="multiplications", example_input=IMAGES)
    assert 1_300_000 < made.multiplications <= 1_600_000


class Table(nn.Module):
    """Makes something of a table of its own once in a call, as some attention layers do of positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("positions", torch.randn(100, 64))

    def forward(self, x):
        return self.second(self.first(x).relu()) + self.table(self.positions).mean(0)


@pytest.mark.parametrize("samples", [2, 3, 256])
def test_what_is_done_once_in_a_call_is_done_for_no_sample(samples):
    model, x = Table(), torch.randn(256, 64)
    made = plan(model, factorization="tt", budget=0.5, count="multiplications", example_input=x[:samples])
    small = apply_(copy.deepcopy(model), made)

    def of_a_sample(model):
        numbers = []
        for count in (1, 256):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(x[:count])
            numbers.append(counter.get_total_flops() / 2)
        return (numbers[1] - numbers[0]) / 255

    assert made.dense_multiplications == of_a_sample(model) == 2 * 64 * 64
    assert made.multiplications == of_a_sample(small) <= 64 * 64


@pytest.mark.parametrize("count", ["parameters", "multiplications"])
@pytest.mark.parametrize("more", [0, 1, 10**6])
def test_a_number_that_the_dense_model_does_not_exceed_is_no_budget(monkeypatch, count, more):
    model = convolutional()
    whole = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiplications": 16 * 16 * 9 * (3 * 32 + 32 * 32) + 320,
    }[count]
    arguments = {"factorization": "tt", "count": count, "example_input": IMAGES}
    with monkeypatch.context() as patched:
        patched.setattr("tenzoo.compression.calibrate.output_metrics", None)  # refused before anything is measured
        message = f"expected fewer {count} in `budget` than the {whole:,} of the model, got {whole + more:,}"
        with pytest.raises(ValueError, match=f"^{message}$"):
            plan(model, budget=whole + more, calibration=IMAGES, **arguments)
    for budget in (whole - 1, 1.0):
        made = plan(model, budget=budget, **arguments)
        assert getattr(made, count) <= (whole if budget == 1.0 else budget)


class Shared(nn.Module):
    """Runs its layer on fewer rows where there are more samples."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        self.layer(torch.ones(10 - len(x), 32))
        return self.head(x)


def test_no_sample_counts_for_less_than_nothing():
    made = plan(Shared(), factorization="tt", ranks=2, example_input=torch.randn(4, 32))
    assert [layer.dense_multiplications for layer in made.layers] == [0, 32 * 32]


def test_the_whole_example_runs_no_more_than_three_times():
    model, sizes = nn.Sequential(nn.Linear(32, 32)), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    plan(model, factorization="tt", ranks=2, example_input=torch.randn(8, 32))
    assert sizes.count(8) == 3  # observed, and its samples told apart by itself and by its last ones
    assert sum(sizes) == 3 * 8 + (1 + 7 + 2 + 6) + (1 + 2)


class Flat(nn.Module):
    """Does not run with a single sample."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        if len(x) < 2:
            raise RuntimeError("too few")
        return self.layer(x)


def test_a_model_that_takes_no_single_sample_is_run_with_all():
    made = plan(Flat(), factorization="tt", ranks=2, example_input=torch.randn(4, 5, 32))
    assert made.dense_multiplications == 5 * 32 * 32
    assert made.multiplications == 5 * 2 * 64


class Texts(nn.Module):
    """An embedding, an LSTM, attention and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.cell, self.head = nn.GRUCell(32, 32), nn.Linear(32, 200)

    def forward(self, x):
        y = self.lstm(self.embedding(x))[0]
        y = self.attention(y, y, y)[0]
        return self.head(self.cell(y[:, 0])[:, None] + y)


def test_weights_that_are_rebuilt_are_counted_and_save_nothing():
    tokens = torch.randint(50, (3, 7))
    made = plan(Texts(), factorization="tt", ranks=4, example_input=tokens)
    numbers = {layer.name: layer.dense_multiplications for layer in made.layers}
    assert numbers["embedding"] == 0
    assert all(
        numbers[f"lstm.weight_{kind}_l{k}{side}"] == 7 * 64 * width
        for k in (0, 1)
        for side in ("", "_reverse")
        for kind, width in (("ih", 32), ("hh", 16))
    )
    assert numbers["attention.in_proj_weight"] == 7 * 96 * 32
    assert numbers["attention.out_proj.weight"] == 7 * 32 * 32
    assert numbers["cell.weight_ih"] == numbers["cell.weight_hh"] == 96 * 32  # once, for the first token
    assert numbers["head"] == 7 * 200 * 32
    assert all(
        layer.multiplications == layer.dense_multiplications for layer in made.layers if layer.name.count("weight")
    )
    assert made.layers[-1].multiplications == 7 * 4 * 232


def test_a_packed_sequence_counts_its_steps():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 4, batch_first=True)

        def forward(self, x):
            return self.lstm(nn.utils.rnn.pack_padded_sequence(x, [3] * len(x), batch_first=True))[0].data

    made = plan(Packed(), factorization="tt", ranks=2, example_input=torch.randn(4, 5, 8))
    assert [layer.dense_multiplications for layer in made.layers] == [3 * 16 * 8, 3 * 16 * 4]


def test_budgets_of_multiplications_with_recurrent_layers():
    tokens, model = torch.randint(50, (1, 7)), Texts()
    arguments = {"factorization": "tt", "count": "multiplications", "example_input": tokens}
    made = plan(model, budget=0.8, **arguments)
    assert made.multiplications <= 0.8 * made.dense_multiplications
    assert {layer.name for layer in made.layers if layer.rank} == {"head"}
    message = (
        r"least that this model can be brought to, got [\d,]+ of [\d,]+; what stays as it is: [\d,]+ in "
        r"'lstm\.weight_ih_l0', 'lstm\.weight_hh_l0' and 10 more, which is reconstructed where a module reads it"
    )
    with pytest.raises(ValueError, match=message):
        plan(model, budget=0.3, **arguments)
    apply_(model, made, example_input=tokens)


# --- what is in the way --------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As in GPT-2."""

    def __init__(self, in_, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_, out))

    def forward(self, x):
        return x @ self.weight


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, 16))


class Own(nn.Linear):
    pass


def hooked():
    (layer := nn.Linear(16, 16)).register_forward_hook(lambda *_: None)
    return layer


def masked():
    (layer := nn.Linear(16, 16)).weight.register_hook(lambda gradient: gradient * 0)
    return layer


def tied():
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    return nn.ModuleList([first, second])


def made_already(wanted):
    model = nn.ModuleDict({"in": nn.Sequential(nn.Linear(64, 64) if wanted == "layer" else nn.GRU(64, 64))})
    return apply_(model, plan(model, factorization="tt", ranks=2))


def old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(16, 16))


def overridden():
    (layer := nn.Linear(16, 16)).forward = lambda x: x
    return layer


def adapted():
    (layer := nn.Linear(16, 16)).adapter = nn.Linear(16, 1)
    return layer


OBSTACLES = {
    "bilinear": (lambda: nn.Bilinear(4, 8, 3), 99, "is a Bilinear, for which there is no tensorized layer"),
    "Conv1D": (lambda: Conv1D(16, 16), 256, f"is a {__name__}.Conv1D, for which there is no tensorized layer"),
    "experts": (Experts, 1024, f"is a {__name__}.Experts, for which there is no tensorized layer"),
    "subclass": (lambda: Own(16, 16), 272, f"is a {__name__}.Own, a class of its own"),
    "hooks": (hooked, 272, "has hooks"),
    "gradient hook": (masked, 272, "has a weight with a hook on its gradient"),
    "old weight norm": (old_weight_norm, 288, "has a weight that is computed from others in a hook"),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), 288, "is parametrized"),
    "tied": (tied, 272, r"shares its weight with rest\.1\.weight"),
    "cores": (lambda: made_already("layer"), 320, "is made of cores already; fold_ the model first"),
    "parametrized cores": (lambda: made_already("gru"), 1408, "is made of cores already; fold_ the model first"),
    "overridden": (overridden, 272, "has a forward pass of its own"),
    "adapted": (adapted, 272, "has more than a weight and a bias"),
    "norm": (lambda: nn.LayerNorm(16), 32, "is a LayerNorm, for which there is no tensorized layer"),
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_reasons_are_listed_with_their_parameters(kind):
    make, number, reason = OBSTACLES[kind]
    model = nn.ModuleDict({"rest": make(), "head": nn.Linear(32, 32, bias=False)})
    with pytest.raises(ValueError, match="what stays as it is: ") as caught:
        plan(model, factorization="tt", budget=1)
    message = str(caught.value)
    assert "\n" not in message
    stays = message.partition("what stays as it is: ")[2]
    assert re.search(rf"\b{number:,} in 'rest[^;]*, which (?:{reason})", stays), stays
    least = int(re.search(r"at least ([\d,]+)", message)[1].replace(",", ""))
    assert plan(model, factorization="tt", budget=least).parameters == least
    everything = sum(parameter.numel() for parameter in model.parameters())
    named = sum(int(found.replace(",", "")) for found in re.findall(r"([\d,]+) in '", stays))
    assert named == everything - 32 * 32  # all but what can become less
    assert least == named + 64


def test_excluded_layers_and_the_rest_of_a_long_list():
    layers = [
        nn.Bilinear(1, 2, 2),
        nn.InstanceNorm1d(4, affine=True),
        nn.LayerNorm(2),
        nn.BatchNorm1d(3),
        nn.PReLU(),
        nn.GroupNorm(1, 4),
    ]
    model = nn.Sequential(nn.Linear(64, 64, bias=False), *layers, nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"stays as it is: 4,096 in '0', which was excluded; .*; 3 elsewhere$"):
        plan(model, factorization="tt", budget=0.5, exclude=["0"])


# --- one fraction for all ------------------------------------------------------------------------------------------


def two_classes():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


@pytest.mark.parametrize("factorization", ["cp", "tucker", "tt", "tr"])
def test_one_fraction_leaves_a_head_of_two_classes_dense(factorization):
    made = plan(two_classes(), factorization=factorization, ranks=0.3)
    assert made.layers[0].rank is not None
    assert made.layers[0].parameters - 64 <= 0.3 * 64 * 64
    assert (made.layers[1].rank, made.layers[1].reason) == (None, "is not worth its cores")
    apply_(copy.deepcopy(two_classes()), made)


def test_a_fraction_that_leaves_everything_dense_is_refused():
    with pytest.raises(ValueError, match=r"`ranks` that leave room for rank one in some layer, got 0\.001"):
        plan(two_classes(), factorization="tt", ranks=0.001)
    with pytest.raises(ValueError, match=r"fraction in `ranks` .* got 0\.3; .* for '2'"):
        plan(two_classes(), factorization="tt", ranks={"0": 0.3, "2": 0.3})  # asked for by name
    for wrong in (1.5, 0.0, float("nan"), -0.5):
        with pytest.raises(ValueError, match=f"`ranks`, got {wrong} for '0'"):
            plan(two_classes(), factorization="tt", ranks=wrong)


def test_a_plan_of_a_compressed_model_says_why_it_is_refused():
    model = two_classes()
    made = plan(model, factorization="tt", ranks=2)
    apply_(model, made)
    with pytest.raises(ValueError, match="planned layer '0' in `model`, got one that is made of cores already"):
        apply_(model, made)
