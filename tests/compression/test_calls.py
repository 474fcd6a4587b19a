"""Inputs as people have them, for planning, carrying out and exporting alike."""

import copy
import json
from collections import UserDict
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tenzoo.compression import Plan, apply_, export, plan
from tenzoo.compression.calls import Call, tensors_in
from tenzoo.compression.fingerprint import fingerprint
from tenzoo.compression.reading import read_calls
from tenzoo.compression.samples import divided

X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(5) < torch.tensor([[5], [4], [3], [5], [2], [1]])).float()


class Encoder(nn.Module):
    """Takes its arguments by position or by name, and an optional one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, mask, scale=None):
        y = self.second(self.first(x).relu()) * mask[..., None]
        return {"logits": y if scale is None else y * scale}


class BatchEncoding(UserDict):
    """As tokenizers return it: a mapping that is no dict."""


def dictionaries(batches):
    return [dict(zip(("x", "mask"), batch, strict=True)) for batch in batches]


FORMS = {
    "tuple": (X, MASK),
    "list": [X, MASK],
    "with None": (X, MASK, None),
    "dict": {"x": X, "mask": MASK},
    "dict with None": {"mask": MASK, "x": X, "scale": None},
    "tokenizer's": BatchEncoding(x=X, mask=MASK),
    "calls": [Call((X, MASK), {})],
    "loader of dicts": DataLoader([{"x": x, "mask": m} for x, m in zip(X, MASK, strict=True)], batch_size=6),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_make_the_same_plan(form):
    model, inputs = Encoder(), FORMS[form]
    expected = plan(model, factorization="tt", budget=0.6, calibration=(X, MASK), example_input=(X, MASK))
    made = plan(model, factorization="tt", budget=0.6, calibration=inputs, example_input=inputs)
    assert made.layers == expected.layers
    assert [layer.name for layer in made.layers] == ["first", "second"]  # no wrapper stands in them
    small = apply_(copy.deepcopy(model), made, calibration=inputs)
    torch.testing.assert_close(small(X, MASK), apply_(model, expected, calibration=(X, MASK))(X, MASK))


@pytest.mark.parametrize("form", FORMS)
def test_exported_programs_are_called_as_the_model_is(tmp_path, form):
    model = Encoder()
    export(model, tmp_path / "model.pt2", FORMS[form])
    program = torch.export.load(tmp_path / "model.pt2").module()
    (call,) = read_calls(FORMS[form], "example_input", model, partial(divided, model, argument="example_input"))
    (smaller,) = next(call.parts(range(3)))
    names = sorted(smaller.kwargs, key=["x", "mask", "scale"].index)
    found = program(*smaller.args, **{name: smaller.kwargs[name] for name in names})
    torch.testing.assert_close(found["logits"], model(X[:3], MASK[:3])["logits"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", ["with None", "dict with None", "tokenizer's"])
def test_inputs_of_an_onnx_graph_are_the_tensors(tmp_path, form):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'tenzoo[export]'")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    export(model := Encoder(), path := tmp_path / "model.onnx", FORMS[form])
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(x.name, x.shape[0]) for x in session.get_inputs()] == [("x", "batch"), ("mask", "batch")]
    found = session.run(None, {"x": X[:4].numpy(), "mask": MASK[:4].numpy()})[0]
    torch.testing.assert_close(torch.as_tensor(found), model(X[:4], MASK[:4])["logits"])


class Images(nn.Module):
    """A list of images is its one argument."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, images):
        return [self.layer(image) for image in images]


def test_a_list_that_is_one_argument_stands_in_a_tuple():
    with pytest.raises(ValueError, match=r"a tensor of shape .* and a tensor .* with which it fails: TypeError"):
        plan(Images(), factorization="tt", budget=0.7, calibration=[X[0], X[1]])
    made = plan(Images(), factorization="tt", budget=0.7, calibration=([X[0], X[1]],))
    assert made.layers[0].rank is not None


# --- loaders -------------------------------------------------------------------------------------------------------


def loader(*tensors, **kwargs):
    return DataLoader(TensorDataset(*tensors), **{"batch_size": 50, **kwargs})


IMAGES, LABELS = torch.arange(300.0).reshape(300, 1), torch.zeros(300)


def test_labels_are_told_from_inputs_by_the_signature():
    for batches in (loader(IMAGES, LABELS), loader(IMAGES, LABELS, LABELS), loader(IMAGES)):
        model = nn.Linear(1, 2)
        calls = read_calls(batches, "calibration", model, partial(divided, model, argument="calibration"))
        assert [call.size for call in calls] == [50, 50, 28]
        assert torch.cat([call.args[0] for call in calls]).equal(IMAGES[:128])
        assert all(len(call.args) == 1 for call in calls)


class Masked(nn.Linear):
    def forward(self, x, mask=None):
        return super().forward(x)


class Open(nn.Linear):
    def forward(self, *inputs):
        return super().forward(inputs[0])


class Two(nn.Linear):
    def forward(self, x, y):
        return super().forward(x + y)


@pytest.mark.parametrize("kind", [Masked, Open])
def test_labels_that_could_be_an_argument_are_refused(kind):
    message = (
        rf"inputs alone in `calibration`, got batches of 2 items where {kind.__name__}\.forward "
        "takes .* arguments, so that labels cannot be told from inputs"
    )
    with pytest.raises(ValueError, match=message):
        plan(kind(1, 8), factorization="tt", ranks=1, calibration=loader(IMAGES, LABELS))
    assert len(read_calls(loader(IMAGES), "calibration", kind(1, 8), lambda *_: None)) == 3


def test_a_batch_with_less_than_the_model_needs_is_refused():
    assert len(read_calls(loader(IMAGES, IMAGES), "calibration", Two(1, 8), lambda *_: None)[0].args) == 2
    with pytest.raises(ValueError, match=r"in `calibration`, got a tensor .* with which it fails: TypeError"):
        plan(Two(1, 8), factorization="tt", ranks=1, calibration=loader(IMAGES))


def test_a_loader_without_batches():
    with pytest.raises(ValueError, match="batches of inputs in `calibration`, got none"):
        plan(nn.Sequential(nn.Linear(1, 2)), factorization="tt", ranks=1, calibration=loader(IMAGES[:0]))


def test_an_example_is_the_first_batch():
    model = nn.Sequential(nn.Linear(1, 30), nn.Linear(30, 30))
    example = loader(IMAGES, LABELS, batch_size=4)
    made = plan(model, factorization="tt", ranks=2, example_input=example)
    assert made == plan(model, factorization="tt", ranks=2, example_input=IMAGES[:4])


# --- the same data for both ----------------------------------------------------------------------------------------


def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))


def test_other_data_than_the_plan_was_made_with_are_refused(tmp_path):
    model, inputs = sequential(), torch.randn(40, 8)
    made = plan(model, factorization="tt", budget=0.7, calibration=inputs)
    made.save(path := tmp_path / "plan.json")
    assert Plan.load(path) == made
    for other in (inputs[:39], inputs.double(), inputs + 1e-6, inputs.reshape(4, 10, 8), (inputs, None)[:1]):
        same = isinstance(other, tuple)  # the same tensor in another form
        if same:
            apply_(sequential(), Plan.load(path), calibration=other)
            continue
        with pytest.raises(ValueError, match="`calibration` data that `plan` was made with, got others"):
            apply_(model, Plan.load(path), calibration=other)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_plan_from_before_the_hash_was_kept_can_be_carried_out(tmp_path):
    inputs = torch.randn(40, 8)
    plan(sequential(), factorization="tt", budget=0.7, calibration=inputs).save(path := tmp_path / "plan.json")
    content = json.loads(path.read_text())
    del content["calibration"]
    path.write_text(json.dumps(content))
    apply_(model := sequential(), Plan.load(path), calibration=inputs)
    assert type(model[2]) is not nn.Linear
    content["calibration"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected a plan"):
        Plan.load(path)


def test_a_loader_that_shuffles_gives_other_data():
    model, inputs = sequential(), torch.randn(40, 8)
    shuffled = DataLoader(TensorDataset(inputs), batch_size=8, shuffle=True)
    made = plan(model, factorization="tt", budget=0.7, calibration=shuffled)
    with pytest.raises(ValueError, match="which a DataLoader that shuffles or augments does not"):
        apply_(model, made, calibration=shuffled)


def test_a_hash_tells_numbers_shapes_and_dtypes_apart():
    calls = [
        Call((torch.zeros(4),), {}),
        Call((torch.zeros(2, 2),), {}),
        Call((torch.zeros(4, dtype=torch.int32),), {}),
        Call((torch.zeros(4, dtype=torch.bfloat16),), {}),
        Call((torch.ones(4),), {}),
        Call((torch.zeros(4), None), {}),
        Call((torch.zeros(4),), {"mask": torch.zeros(4)}),
        Call((torch.zeros(4), 3), {}),
    ]
    assert len({fingerprint([call]) for call in calls}) == len(calls)
    assert fingerprint(calls[:1]) == fingerprint([Call((torch.zeros(4, 2)[:, 0],), {})])


# --- what is none --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (3, TypeError, "or a DataLoader, in `calibration`, got a int"),
        ({1: X}, TypeError, r"names of arguments in the mapping in `calibration`, got \[1\]"),
        ({}, ValueError, "the arguments of the model in `calibration`, got none"),
        ([None], ValueError, "a tensor in `calibration`, got None"),
        (torch.ones(2, 8).to("meta"), ValueError, "numbers in `calibration`, got a tensor on the meta device"),
        (torch.ones(2, 8).to_sparse(), ValueError, r"dense tensors in `calibration`, got one of layout .*x\.to_dense"),
        ({"input": torch.ones(2, 8).to_sparse()}, ValueError, "dense tensors in `calibration`"),
        ((torch.ones(2, 8), [torch.ones(0)]), ValueError, r"an empty one of shape \(0,\)"),
        (torch.full((2, 8), torch.inf), ValueError, "finite numbers in `calibration`"),
        ({"inputs": torch.ones(2, 8)}, ValueError, "float32 as 'inputs', with which it fails: TypeError: .*'inputs'"),
    ],
)
def test_what_is_no_input_is_named(inputs, error, message):
    with pytest.raises(error, match=message):
        plan(sequential(), factorization="tt", budget=0.7, calibration=inputs)
    with pytest.raises(error, match=message.replace("calibration", "example_input")):
        plan(sequential(), factorization="tt", budget=0.7, example_input=inputs)


def test_a_mask_may_hold_minus_infinity():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    made = plan(model, factorization="tt", budget=0.7, calibration=(X, mask))
    assert made.data_aware
    assert made.parameters <= 0.7 * made.dense_parameters


# --- outputs -------------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.layer, self.made = nn.Linear(8, 8), made

    def forward(self, x):
        return self.made(self.layer(x))


def test_outputs_without_numbers_are_refused():
    for made, message in (
        (lambda y: y.argmax(-1), "returns floating-point tensors on `calibration`, got a Tensor"),
        (lambda y: y * torch.nan, "outputs on `calibration` are numbers, got NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(Returns(made), factorization="tt", budget=0.7, calibration=X)


def test_outputs_in_mappings_count():
    assert [len(tensors_in(value)) for value in (X, [X, {"a": (X, None)}], BatchEncoding(y=[X, X]))] == [1, 2, 2]
    blind = plan(Returns(lambda y: y), factorization="tt", budget=0.7, calibration=X)
    made = plan(Returns(lambda y: BatchEncoding(logits=y)), factorization="tt", budget=0.7, calibration=X)
    assert made.layers[0].rank == blind.layers[0].rank


# --- what stays as it was ------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Draws random numbers and counts its calls, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x) + torch.randn(x.shape)


def test_buffers_and_random_numbers_do_not_notice_a_plan():
    model = Counting()
    state = torch.get_rng_state()
    made = [plan(model, factorization="tt", budget=0.7, calibration=X, example_input=X) for _ in range(2)]
    assert made[0] == made[1]
    assert torch.get_rng_state().equal(state)
    assert model.calls == 0


class Padded(nn.Module):
    """The mean of each sequence, over as many steps as it has: a list of sequences, or a batch and lengths."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 32)

    def forward(self, x, lengths=None):
        if lengths is None:
            lengths = [len(sequence) for sequence in x]
            x = nn.utils.rnn.pad_sequence(x, batch_first=True)
        y = self.second(self.first(x).relu())
        return torch.stack([steps[: int(length)].mean(0) for steps, length in zip(y, lengths, strict=True)])


LENGTHS = [1, 20] * 4 + [20] * 8


@pytest.mark.parametrize("kind", ["list", "tuple", "array", "tensor"])
def test_samples_that_are_held_back_keep_their_own_values(kind):
    model, x = Padded(), torch.randn(16, 20, 8, generator=torch.Generator().manual_seed(1))
    given = {"list": list, "tuple": tuple, "array": np.array, "tensor": torch.tensor}[kind](LENGTHS)
    made = plan(model, factorization="tt", budget=0.6, calibration=(x, given))
    small = apply_(copy.deepcopy(model), made, calibration=(x, given))
    last = x[12:], given[12:]
    with torch.no_grad():
        own = (small(*last) - model(*last)).norm() / model(*last).norm()
    assert made.output_error == pytest.approx(own.item(), rel=1e-4)


@pytest.mark.parametrize("shapes", [[(5, 8), (9, 8), (7, 8), (6, 8)], [(6, 8)] * 4], ids=["other", "same"])
def test_a_list_of_samples_is_divided_nowhere(shapes):
    model = Padded()
    sequences = [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k, shape in enumerate(shapes)]
    made = plan(model, factorization="tt", budget=0.6, calibration=(sequences,), example_input=(sequences,))
    small = apply_(copy.deepcopy(model), made, calibration=(sequences,))
    with torch.no_grad():
        own = (small(sequences) - model(sequences)).norm() / model(sequences).norm()
    assert made.output_error == pytest.approx(own.item(), rel=1e-4)
    padded = max(shape[0] for shape in shapes)
    assert made.dense_multiplications == len(shapes) * padded * (8 * 32 + 32 * 32)  # of the one call


@pytest.mark.parametrize(
    ("args", "size"),
    [
        ((torch.ones(4, 3), [1, 2, 3, 4]), 4),
        ((torch.ones(4, 3), [1, 2, 3]), 4),
        ((torch.ones(4, 3), object()), 4),
        (([torch.ones(4, 3)] * 2,), 1),
        (({"image": torch.ones(4, 3), "scale": 2.0},), 4),
        (({"images": [torch.ones(4, 3)]},), 1),
        ((BatchEncoding(image=torch.ones(4, 3)),), 4),
        ((2.0, torch.ones(())), 0),
    ],
)
def test_how_many_samples(args, size):
    assert Call(args, {}).size == size


class InPlace(nn.Module):
    """Changes what it is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        x.mul_(2).add_(1)
        return self.last(self.layer(x).relu_())


@pytest.mark.parametrize("suffix", [None, ".pt2", ".onnx"])
def test_the_users_inputs_stay_as_they_are(tmp_path, suffix):
    model, x = InPlace(), torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    if suffix:
        export(model, tmp_path / f"model{suffix}", x)
    else:
        made = plan(model, factorization="tt", budget=0.6, calibration=x, example_input=x)
        small = apply_(copy.deepcopy(model), made, calibration=x)
        with torch.no_grad():
            expected = model(x[12:].clone())
            own = (small(x[12:].clone()) - expected).norm() / expected.norm()
        assert made.output_error == pytest.approx(own.item(), rel=1e-4)
    assert x.equal(before)
