"""Inputs are divided by samples only where the model itself tells them apart; they are copied, and told from others."""

import copy
from collections import UserDict, deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.ops import roi_align

from tenzoo.compression import apply_, plan
from tenzoo.compression.calls import Call
from tenzoo.compression.fingerprint import fingerprint
from tenzoo.compression.samples import divided

SAMPLES = 16
X = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(1))
WEIGHTS = [0.01, 3.0] * 4 + [3.0] * 8
"""Of each sample; those held back have others than the first ones."""


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 16)

    def weighed(self, x, weights):
        return self.second((self.first(x) * torch.as_tensor(weights).float().reshape(-1, 1)).relu())


class Items(Layers):
    """Weighs each sample by an item of its own, of any kind; a sample without an item weighs one."""

    def forward(self, x, items):
        assert len(items) >= len(x)
        return self.weighed(x, [weight(item) for item, _ in zip(items, x, strict=False)])


def weight(item):
    if item is None:
        return 1.0
    if isinstance(item, dict):
        return weight(item["weight"])
    if isinstance(item, tuple | list | bytes):
        return weight(item[0])
    return abs(complex(item))


ITEMS = {
    "tensors": lambda w: torch.tensor(w),
    "arrays": lambda w: np.array(w),
    "dicts": lambda w: {"weight": torch.tensor(w)},
    "tuples": lambda w: (w, "a name"),
    "lists": lambda w: [w] * SAMPLES,
    "None": lambda w: None if w == 3 else w,
    "complex": lambda w: w * 1j,
    "bytes": lambda w: bytes([int(10 * w)]),
    "numpy's": lambda w: np.float64(w),
    "integers of numpy": lambda w: np.int64(10 * w),
    "floats": lambda w: w,
}


def own_error(model, made, given, judged):
    """Of the compressed model, measured from outside on some of the inputs."""
    small = apply_(copy.deepcopy(model), made, calibration=given)
    with torch.no_grad():
        return ((small(*judged) - model(*judged)).norm() / model(*judged).norm()).item()


@pytest.mark.parametrize("form", [list, tuple])
@pytest.mark.parametrize("kind", ITEMS)
def test_samples_keep_the_items_that_are_theirs(kind, form):
    model, items = Items(), form(ITEMS[kind](w) for w in WEIGHTS)
    made = plan(model, factorization="tt", budget=0.6, calibration=(X, items))
    assert made.held_back
    assert made.output_error == pytest.approx(own_error(model, made, (X, items), (X[12:], items[12:])), rel=1e-4)


def test_the_last_batch_of_a_loader_is_cut_with_its_items():
    samples = [(x, {"weight": w}) for x, w in zip(X.repeat(8, 1), WEIGHTS * 8, strict=True)]

    def collate(batch):
        return torch.stack([x for x, _ in batch]), [item for _, item in batch]

    model, loader = Items(), DataLoader(samples, batch_size=48, collate_fn=collate)  # 48 + 48 + 32 of 48
    made = plan(model, factorization="tt", budget=0.6, calibration=loader)
    held = collate(samples[96:128])
    assert made.output_error == pytest.approx(own_error(model, made, loader, held), rel=1e-4)


class Table(Layers):
    """Compares each sample with the rows of a table."""

    def forward(self, x, table):
        return self.second(self.first(x).relu()) @ table.t()


class Related(Layers):
    """Averages over the neighbours of each sample, or over all that come before it."""

    def forward(self, x, neighbours=None):
        y = self.first(x).relu()
        y = y.cumsum(0) if neighbours is None else neighbours @ y
        return self.second(y)


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (Table(), (X, torch.randn(SAMPLES, 16))),
        (Related(), (X, torch.rand(SAMPLES, SAMPLES))),
        (Related(), (X, torch.eye(SAMPLES).roll(5, 0))),
        (Related(), (X,)),
    ],
    ids=["a table of as many rows", "a graph", "a permutation", "steps"],
)
def test_what_cannot_be_divided_is_judged_as_a_whole_and_it_is_said(model, given):
    made = plan(model, factorization="tt", budget=0.6, calibration=given)
    assert not made.held_back
    assert made.output_error == pytest.approx(own_error(model, made, given, given), rel=1e-4)
    assert "on these very inputs, whose samples cannot be told apart" in " ".join(str(made).split())


class Boxes(Layers):
    """Pools by boxes, one list of them for each sample, and fails where there are fewer or more."""

    def forward(self, x, boxes):
        if len(boxes) != len(x):
            return torch.full((len(x), 16), torch.nan)
        return self.weighed(x, [box[0].sum() for box in boxes])


def test_a_list_of_boxes_goes_with_its_images():
    boxes = [torch.tensor([[w, w]]) for w in WEIGHTS]
    made = plan(Boxes(), factorization="tt", budget=0.6, calibration=(X, boxes), example_input=(X, boxes))
    assert made.held_back
    assert made.dense_multiplications == 8 * 32 + 32 * 16


class Pooled(nn.Module):
    """Pools features of images by boxes that are numbered by their image, which torchvision does not check."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(144, 32)

    def forward(self, x, boxes):
        largest.append(int(boxes[:, 0].max()) - len(x))
        return self.head(roi_align(self.conv(x).relu(), boxes, 3).flatten(1))


largest: list[int] = []


def test_numbers_of_samples_are_never_out_of_range():
    """On a GPU that would end the process, and what lies behind a tensor may be its like, or NaN."""
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    corners = torch.rand(8, 4, generator=torch.Generator().manual_seed(2)) * 8 + torch.tensor([0, 0, 8, 8])
    largest.clear()
    for numbers in (torch.arange(8.0), torch.arange(8.0).flip(0)):
        given = x, torch.cat([numbers[:, None], corners], 1)
        made = plan(Pooled(), factorization="tt", budget=0.6, calibration=given, example_input=given)
        assert not made.held_back
        assert made.output_error == pytest.approx(own_error(Pooled(), made, given, given), rel=1e-4)
    assert max(largest) < 0


class Recorded(Layers):
    """Makes what a function makes of its outputs, and counts its runs in a buffer, which they depend on."""

    def __init__(self, made):
        super().__init__()
        self.made = made
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        return self.made(self.runs * self.second(self.first(x).relu()))


@pytest.mark.parametrize(
    "made",
    [
        lambda y: y,
        lambda y: (y, y.mean(), torch.ones(3)),
        lambda y: (y, torch.stack([y, 2 * y])),
        lambda y: {"heads": y.reshape(-1, 4)},
        lambda y: y.reshape(-1, 4, 4).transpose(0, 1).flatten(0, 1),
        lambda y: y.unbind(),
        lambda y: [{"one": row, "other": row[:3]} for row in y],
        lambda y: y.to_sparse(),
    ],
    ids=[
        "rows",
        "a loss and a constant",
        "a batch that is second",
        "more rows",
        "steps first",
        "a list",
        "a list of dicts",
        "sparse",
    ],
)
def test_outputs_may_hold_the_samples_in_any_order_of_modes(made):
    first, last = divided(Recorded(made), Call((X,), {}), 12, "calibration")
    assert (first.args[0].equal(X[:12]), last.args[0].equal(X[12:])) == (True, True)


@pytest.mark.parametrize(
    "made",
    [
        lambda y: y.flip(0),
        lambda y: y - y.mean(0),
        lambda y: y.cumsum(0),
        lambda y: y @ y.t(),
        lambda y: y.mean(0),
        lambda y: torch.where(torch.tensor(len(y) < SAMPLES), torch.nan, y),
        lambda y: y / len(y),
        lambda y: torch.ones(SAMPLES),
        lambda y: y.argmax(-1),
    ],
    ids=["reversed", "centered", "summed", "pairs", "mean", "NaN", "a share", "constant", "classes"],
)
def test_outputs_that_are_not_those_of_samples_divide_nothing(made):
    assert divided(Recorded(made), Call((X,), {}), 12, "calibration") is None


def test_a_state_in_a_tuple_as_long_as_the_batch_is_no_list_of_samples():
    model, x = nn.LSTM(8, 8, batch_first=True), torch.randn(2, 5, 8)
    state = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    assert divided(model, Call((x, state), {}), 1, "calibration") is None  # its outputs hold the state as well


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_that_depends_on_the_batch_divides_all_the_same(dtype):
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64)).to(dtype)
    call = Call((torch.randn(64, 64, dtype=dtype),), {})
    first, last = divided(model, call, 48, "calibration")
    assert (first.size, last.size) == (48, 16)


# --- copies, and what is the same ----------------------------------------------------------------------------------


@dataclass
class Data:
    x: object
    name: str = "data"


class Plain:
    def __init__(self, x=None):
        self.x = x


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


FORMS = {
    "dataclass": Data,
    "mapping": lambda x: UserDict(x=x),
    "object": lambda x: Plain(x),
    "slots": Slots,
    "deque": lambda x: deque([x]),
    "nested": lambda x: {"a": [Data(UserDict(x=x))]},
}


def content(value):
    while not isinstance(value, torch.Tensor | np.ndarray):
        if isinstance(value, dict | UserDict):
            value = next(iter(value.values()))
        elif isinstance(value, list | deque):
            value = value[0]
        else:
            value = value.x
    return value


class InPlace(Layers):
    """Changes what it is given."""

    def forward(self, x, scale):
        value = content(scale)
        value *= 2
        return self.weighed(x, value[: len(x)] if len(value) > 1 else value)


@pytest.mark.parametrize("kind", ["tensor", "array"])
@pytest.mark.parametrize("form", [*FORMS, "itself"])
def test_a_model_that_writes_into_its_inputs_changes_no_input(form, kind):
    value = torch.tensor([0.5]) if kind == "tensor" else np.array([0.5])
    scale = value if form == "itself" else FORMS[form](value)
    made = plan(InPlace(), factorization="tt", budget=0.6, calibration=(X, scale), example_input=(X, scale))
    apply_(InPlace(), made, calibration=(X, scale), example_input=(X, scale))
    assert float(value[0]) == 0.5


@pytest.mark.parametrize("kind", ["tensor", "array"])
@pytest.mark.parametrize("form", [*FORMS, "itself"])
def test_other_numbers_in_an_input_of_any_kind_are_other_data(form, kind):
    def given(number):
        value = torch.tensor([number]) if kind == "tensor" else np.array([number])
        return X, value if form == "itself" else FORMS[form](value)

    made = plan(InPlace(), factorization="tt", budget=0.6, calibration=given(0.5))
    apply_(InPlace(), made, calibration=given(0.5))
    with pytest.raises(ValueError, match="`calibration` data that `plan` was made with, got others"):
        apply_(InPlace(), made, calibration=given(50.0))


def test_a_hash_tells_values_of_all_kinds_apart():
    around = Plain()
    around.around = around
    values = [{"a", "b"}, {"a"}, frozenset({"a"}), deque([1]), deque([2]), Data(1), Data(2), Data(1, "other"), Data, 1j]
    values += [b"1", np.int64(1), np.int32(1), np.array([None, 1]), np.array([None, 2]), UserDict(a=1), {"a": 1}]
    values += [Slots(1), Slots(2), len, np.mean, around, torch.Generator().manual_seed(1)]
    hashes = [fingerprint([Call((X, value), {})]) for value in values]
    assert len({*hashes}) == len(values) - 1  # the two kinds of sets with one content are one
    assert hashes == [fingerprint([Call((X, copy.deepcopy(value)), {})]) for value in values]


@pytest.mark.parametrize("form", [Plain, Data])
def test_tensors_of_all_kinds_have_a_hash(form):
    rows = torch.eye(3), torch.eye(3).roll(1, 0)
    kinds = {
        "sparse": lambda x: x.to_sparse(),
        "conjugate": lambda x: (x * 1j).conj(),
        "negative": lambda x: (x * 1j).conj().imag,
        "nested": lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
    }
    for kind, make in kinds.items():
        one, same, other = (fingerprint([Call((X, form(make(x))), {})]) for x in (rows[0], rows[0].clone(), rows[1]))
        assert (one == same, one == other) == (True, False), kind


class Mute:
    """Can be copied, but nothing is known of it."""

    def __deepcopy__(self, memo):
        return self

    def __reduce_ex__(self, protocol):
        raise RuntimeError("no parts")


@pytest.mark.parametrize("value", [Mute(), Plain(torch.ones(2, device="meta"))], ids=["mute", "meta"])
def test_what_has_no_hash_is_refused_before_work(value, caplog):
    caplog.set_level("INFO")
    message = r"that can be told apart in `calibration`, got a tensor .* and a \w+: \w+Error: "
    with pytest.raises(ValueError, match=message):
        plan(InPlace(), factorization="tt", budget=0.6, calibration=(X, value))
    assert not caplog.records


def test_what_cannot_be_copied_is_refused(tmp_path):
    message = r"that can be copied in `calibration`, got a tensor .* and a TextIOWrapper"
    with (tmp_path / "file").open("w") as file, pytest.raises(ValueError, match=message):
        plan(InPlace(), factorization="tt", budget=0.6, calibration=(X, file))
