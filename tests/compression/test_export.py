"""Files compute what the model computes, for any batch, or are not there."""

import copy
import logging
import math
import sys
import warnings

import pytest
import torch
from torch import nn

from tenzoo.compression import apply_, export, plan
from tenzoo.compression.export import _error
from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedLayer, TensorizedLinear
from tenzoo.models import Decoder
from tenzoo.models.resnet import CIFARResNet
from tests.factorizations.formats import NAMES

ONES = torch.ones(1, 4)


@pytest.fixture(params=[".pt2", ".onnx"])
def suffix(request):
    if request.param == ".onnx":
        for name in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(name, reason=f"{name} is not installed: pip install 'tenzoo[export]'")
    return request.param


def run(path, *inputs):
    """The outputs of a file, one after the other."""
    if path.suffix == ".pt2":
        with torch.no_grad():
            return torch.utils._pytree.tree_leaves(torch.export.load(path).module()(*inputs))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    fed = {own.name: x.numpy() for own, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.as_tensor(y) for y in session.run(None, fed)]


def assert_same(path, model, *inputs):
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(copy.deepcopy(model).eval()(*inputs))
    actual = run(path, *inputs)
    assert [y.shape for y in actual] == [y.shape for y in expected]
    for found, y in zip(actual, expected, strict=True):
        assert (found - y).abs().max() <= 1e-4 * y.abs().max()


class Network(nn.Module):
    """A convolution, a linear layer and an embedding."""

    def __init__(self, factorization="tt", implementation="auto"):
        super().__init__()
        torch.manual_seed(0)
        cores = {"factorization": factorization, "rank": 2, "implementation": implementation}
        self.convolution = TensorizedConv2d(3, 32, 3, stride=2, **cores)
        self.norm = nn.BatchNorm2d(32)
        self.linear = TensorizedLinear(32 * 9, 64, **cores)
        self.embedding = TensorizedEmbedding(600, 64, padding_idx=0, **cores)

    def forward(self, x, index):
        return self.linear(self.norm(self.convolution(x)).relu().flatten(1)), self.embedding(index)


def inputs(batch):
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, 8, 8, generator=generator), torch.randint(600, (batch, 4), generator=generator)


# --- outputs -------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("factorization", NAMES)
def test_files_with_factors_compute_what_the_model_does_and_are_small(tmp_path, suffix, factorization):
    model, path = Network(factorization), tmp_path / f"small{suffix}"
    export(model, path, inputs(2), factors=True)
    assert_same(path, model, *inputs(5))
    layers = (model.convolution, model.linear, model.embedding)
    assert path.stat().st_size < 4 * sum(layer.weight.numel() for layer in layers)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("factorization", ["btt", "tr"])
def test_files_with_dense_weights_compute_what_the_model_does(tmp_path, suffix, factorization):
    """What is exported is torch's layers, whatever the format was."""
    model, path = Network(factorization), tmp_path / f"dense{suffix}"
    export(model, path, inputs(1))
    assert_same(path, model, *inputs(5))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".onnx"], indirect=True)
def test_weights_are_not_rebuilt_in_the_file(tmp_path, suffix):
    model = Network("tr", implementation="reconstruct")
    export(model, path := tmp_path / f"model{suffix}", inputs(2), factors=True)
    import onnx

    stored = sum(math.prod(constant.dims) for constant in onnx.load(path).graph.initializer)
    assert stored < 2 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_a_residual_network(tmp_path, suffix):
    torch.manual_seed(0)
    model, batch = CIFARResNet(20, factorization="tt", rank=3), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        model(batch)  # running means of its own
    dense = 4 * sum(parameter.numel() for parameter in CIFARResNet(20).parameters())
    for factors in (False, True):
        path = tmp_path / f"resnet-{factors}{suffix}"
        export(model, path, batch[:2], factors=factors)
        assert_same(path, model, batch)
        assert (path.stat().st_size < dense) == factors


@pytest.mark.slow
def test_a_network_of_another_library(tmp_path, suffix):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    dense = 4 * sum(parameter.numel() for parameter in model.parameters())
    apply_(model, plan(model, factorization="tt", budget=0.3))
    for factors in (False, True):
        path = tmp_path / f"resnet18-{factors}{suffix}"
        export(model, path, torch.randn(1, 3, 64, 64), factors=factors)
        assert_same(path, model, torch.randn(3, 3, 64, 64))
        assert (path.stat().st_size < 0.4 * dense) == factors


class Attention(nn.Module):
    def __init__(self, network=None):
        super().__init__()
        self.network = network
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x, scale, *others, mask=None):
        y, weights = self.attention(x, x, x)
        more = self.network(*others) if others else None
        return {"logits": self.head(y) * scale, "more": (weights, more)}


def test_parametrized_weights_several_inputs_and_nested_outputs(tmp_path, suffix):
    model = Attention()
    apply_(model, plan(model, factorization="tt", ranks=2))
    x, scale = torch.randn(4, 5, 16), torch.tensor(2.0)
    paths = {factors: tmp_path / f"model-{factors}{suffix}" for factors in (False, True)}
    for factors, path in paths.items():
        export(model, path, (x[:1], scale), factors=factors)
        logits, weights, *_ = run(path, x, scale)
        expected = model(x, scale)
        torch.testing.assert_close(logits, expected["logits"])
        torch.testing.assert_close(weights, expected["more"][0])
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(paths[True])
        assert [(x.name, x.shape) for x in session.get_inputs()] == [("x", ["batch", 5, 16]), ("scale", [])]
        assert [y.name for y in session.get_outputs()] == ["output_logits", "output_more_0"]


def test_other_parametrizations_and_layers_by_themselves(tmp_path):
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)))
    layer = TensorizedLinear(6, 4, factorization="tt", rank=2)
    for name, model in {"normed": normed, "layer": layer}.items():
        export(model, path := tmp_path / f"{name}.pt2", torch.randn(2, 6))
        assert_same(path, model, torch.randn(3, 6))


def test_recurrent_layers(tmp_path, suffix):
    model, path = nn.LSTM(4, 3, batch_first=True), tmp_path / f"lstm{suffix}"
    export(model, path, torch.randn(2, 5, 4))
    assert_same(path, model, torch.randn(3, 5, 4))


class Sum(nn.Module):
    def forward(self, scale, *inputs):
        return scale * inputs[0] + inputs[1].sum(), inputs[0] + inputs[2]


def test_inputs_that_share_the_batch_size_and_others(tmp_path, suffix):
    scale, fixed = torch.tensor(2.0), torch.randn(3)
    export(Sum(), path := tmp_path / f"sum{suffix}", (scale, torch.randn(2, 4), fixed, torch.randn(2, 4)))
    assert_same(path, Sum(), scale, torch.randn(7, 4), fixed, torch.randn(7, 4))


class Fixed(nn.Module):
    def forward(self, x):
        return x.view(2, -1).exp()


def test_a_batch_size_that_is_fixed(tmp_path, suffix):
    path = tmp_path / f"fixed{suffix}"
    with pytest.raises(ValueError, match=r"any batch size unless dynamic_batch=False.*`model`, got .*constant \(2\)$"):
        export(Fixed(), path, torch.randn(2, 4))
    assert not list(tmp_path.iterdir())
    export(Fixed(), path, torch.randn(2, 4), dynamic_batch=False)
    assert_same(path, Fixed(), torch.randn(2, 4))
    with pytest.raises(Exception, match=r"(?i)dimension|guard"):
        run(path, torch.randn(4, 4))


class OfLength(nn.Module):
    """Sequences of one length."""

    def forward(self, x):
        return x.view(-1, 5, 4).exp()


def test_a_length_that_is_fixed(tmp_path, suffix):
    path = tmp_path / f"fixed{suffix}"
    with pytest.raises(
        ValueError, match=r"^expected a model that takes any length in `model`, unless dynamic_length=Fa"
    ):
        export(OfLength(), path, torch.randn(2, 5, 4), dynamic_length=True)
    with pytest.raises(
        ValueError, match=r"^expected an input of shape \(N, T, …\) in `example_input` with dynamic_length"
    ):
        export(nn.ReLU(), path, torch.randn(3), dynamic_length=True)
    assert not list(tmp_path.iterdir())
    export(OfLength(), path, torch.randn(2, 5, 4))
    assert_same(path, OfLength(), torch.randn(3, 5, 4))


PARTS = {"embedding": "tt", "attention": "btt", "feed_forward": "tucker"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"factorization": PARTS, "rank": {"embedding": 3, "attention": 5, "feed_forward": 0.3}},
        {"factorization": "tr", "rank": 3, "tied": False, "positions": "learned", "kv_heads": 2, "norm": "layer"},
    ],
    ids=["dense", "tied", "learned"],
)
@pytest.mark.parametrize("factors", [False, True])
def test_a_language_model_for_texts_of_any_number_and_length(tmp_path, suffix, settings, factors):
    torch.manual_seed(0)
    model = Decoder(65, width=32, depth=2, context=40, **settings)
    path = tmp_path / f"decoder{suffix}"
    export(model, path, torch.randint(65, (1, 7)), factors=factors, dynamic_length=True)
    for size in ((1, 1), (3, 29), (2, 40)):
        assert_same(path, model, torch.randint(65, size))


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [(".pt2", torch.float64), (".pt2", torch.bfloat16), (".onnx", torch.float16)],
    indirect=["suffix"],
)
def test_other_precisions(tmp_path, suffix, dtype):
    model, x = nn.Linear(8, 6).to(dtype), torch.randn(3, 8).to(dtype)
    export(model, path := tmp_path / f"model{suffix}", x)
    torch.testing.assert_close(run(path, x)[0], model(x), rtol=1e-2, atol=1e-2)


# --- what stays as it was ------------------------------------------------------------------------------------------


def test_the_model_stays_as_it_is(tmp_path):
    model = Attention(Network("cp"))
    apply_(model, plan(model, factorization="tt", ranks=2))
    model.network.eval()
    example = torch.randn(2, 5, 16), torch.tensor(1.0), *inputs(2)
    before = copy.deepcopy(example), copy.deepcopy(model.state_dict())
    modules = [(module, type(module), module.training) for module in model.modules()]
    chosen = [module.implementation for module in model.modules() if isinstance(module, TensorizedLayer)]
    for factors in (False, True):
        export(model, tmp_path / f"{factors}.pt2", example, factors=factors)
    assert [(module, type(module), module.training) for module in model.modules()] == modules
    assert [module.implementation for module in model.modules() if isinstance(module, TensorizedLayer)] == chosen
    assert model.state_dict().keys() == before[1].keys()
    assert all(value.equal(before[1][name]) for name, value in model.state_dict().items())
    assert all(x.equal(y) for x, y in zip(example, before[0], strict=True))
    model(*example)


def test_the_example_and_names_of_files_are_not_written(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    example = torch.full((1, 8), 1234.5678)
    export(nn.Linear(8, 4), path, example)
    content = path.read_bytes()
    assert example[0, :1].numpy().tobytes() not in content
    assert str(tmp_path).encode() not in content
    assert nn.__file__.rpartition("/")[0].encode() not in content


def test_warnings_of_the_model_are_heard_and_settings_come_back(tmp_path):
    class Warns(nn.Linear):
        def forward(self, x):
            if not torch.compiler.is_compiling():
                warnings.warn("about x", stacklevel=2)
            return super().forward(x)

    level = logging.getLogger("torch.onnx").level
    with pytest.warns(UserWarning, match="about x"):
        export(Warns(4, 3), tmp_path / "model.pt2", torch.randn(2, 4))
    assert logging.getLogger("torch.onnx").level == level


# --- refusals ------------------------------------------------------------------------------------------------------


def test_an_existing_file_is_kept(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=f"expected a new file in `path`, got .*model{suffix}', which exists"):
        export(None, path, None)  # nothing else is looked at
    assert path.read_text() == "mine"


def test_a_file_that_comes_up_meanwhile_is_kept(tmp_path):
    path = tmp_path / "model.pt2"

    class Writes(nn.Linear):
        def forward(self, x):
            path.write_text("mine")
            return super().forward(x)

    with pytest.raises(FileExistsError, match="expected a new file"):
        export(Writes(4, 3), path, torch.randn(2, 4))
    assert [(file, file.read_text()) for file in tmp_path.iterdir()] == [(path, "mine")]


@pytest.mark.parametrize(
    ("path", "example", "error", "message"),
    [
        ("model.pth", ONES, ValueError, r"one of \['\.onnx', '\.pt2'\] in `path`, got .*model\.pth'"),
        ("model", ONES, ValueError, "in `path`, got"),
        ("none/model.pt2", ONES, FileNotFoundError, "existing folder in `path`, got"),
        ("model.pt2", "ones", TypeError, "tuple or list of the arguments .* in `example_input`, got a str"),
        ("model.pt2", (ONES, 3), TypeError, "in `example_input`, got a int"),
        ("model.pt2", (), ValueError, "in `example_input`, got none"),
        ("model.pt2", ONES[:0], ValueError, "in `example_input`, got an empty one"),
        ("model.pt2", (ONES, ONES), ValueError, "in `example_input`, got a tensor .* with which it fails: TypeError: "),
    ],
)
def test_bad_arguments(tmp_path, path, example, error, message):
    with pytest.raises(error, match=message):
        export(nn.Flatten(), tmp_path / path, example)
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Squeezing(nn.Module):
    """Two batch sizes for which it fails."""

    def forward(self, x):
        if x.shape[0] < 3:
            raise RuntimeError("too few\nof them")
        return x


class Drifting(nn.Module):
    """Computes something else when it is followed."""

    def forward(self, x):
        return x * (1.01 if torch.compiler.is_compiling() else 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branching(), "expected a model that torch.export can follow.* in `model`, got GuardOnDataDependentSymNode: "),
        (Squeezing(), "any batch size in `model`, unless dynamic_batch=False, got RuntimeError: too few$"),
        (Drifting(), r"differ by at most 1e-04 of the largest from those of `model`, got 1\.0e-02"),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_no_file(tmp_path, suffix, model, message):
    with pytest.raises(ValueError, match=message) as caught:
        export(model, tmp_path / f"model{suffix}", torch.ones(3, 4))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_error_of_onnxruntime_does_not_name_the_temporary_folder(tmp_path):
    model = nn.Conv2d(3, 4, 3).bfloat16()
    with pytest.raises(ValueError, match=r"got InvalidGraph: .* model\.onnx failed") as caught:
        export(model, tmp_path / "model.onnx", torch.randn(2, 3, 8, 8).bfloat16())
    assert ".tmp-" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, suffix, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fail)
    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises((OSError, ValueError), match="disk full"):
        export(nn.Linear(4, 3), tmp_path / f"model{suffix}", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


def test_a_model_too_large_for_onnx_is_refused(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(sys.modules["tenzoo.compression.exported_files"], "_LARGEST", 50)
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt2":
        export(nn.Linear(4, 3), path, torch.randn(2, 4))
        return
    with pytest.raises(ValueError, match=r"at most 50 bytes of weights.* in `model`, got 60; write a \.pt2"):
        export(nn.Linear(4, 3), path, torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", sys)
    with pytest.raises(ImportError, match=r"expected the package onnxruntime.*pip install 'tenzoo\[export\]'"):
        export(None, tmp_path / "model.onnx", None)


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0),
        ([1.0, 3.0], [1.0, 2.0], 0.5),
        ([float("nan"), float("inf")], [float("nan"), float("inf")], 0),
        ([0.0], [0.0], 0),
        ([1.0], [0.0], float("inf")),
        ([1.0], [float("-inf")], float("inf")),
        ([float("inf"), 1.0], [2.0, 1.0], float("inf")),
    ],
)
def test_errors_are_relative_to_the_largest_output(actual, expected, error):
    assert _error(torch.tensor(actual), torch.tensor(expected)) == error


class Nested(nn.Module):
    """Takes its tensors in a list."""

    def __init__(self):
        super().__init__()
        self.layer = TensorizedLinear(16, 16, factorization="tt", rank=4)

    def forward(self, pair):
        return self.layer(pair[0]) + pair[1]


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_tensors_in_a_list_have_one_batch(tmp_path, suffix):
    model = Nested().eval()
    export(model, tmp_path / f"model{suffix}", ([torch.randn(4, 16), torch.randn(4, 16)],), factors=True)
    if suffix == ".pt2":
        program, pair = torch.export.load(tmp_path / "model.pt2").module(), [torch.randn(7, 16), torch.randn(7, 16)]
        torch.testing.assert_close(program(pair), model(pair))
