"""Settings and files that do not fit end in one line, and leave the model as it was."""

import shutil

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs the extra text: pip install tenzoo[text]")

from peft import PeftModel, get_peft_model

from tenzoo.adapters import TensorAdapterConfig
from tenzoo.compression import apply_, plan


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, 1)

    def forward(self, x):
        return self.second(self.first(x))


def adapted(width=32, **settings):
    return get_peft_model(Net(width), TensorAdapterConfig(**{"target_modules": ["first"], "r": 4, **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lokr"}, r"^expected one of \['lora', 'flora', 'network', 'bottleneck'\] in `kind`, got 'lokr'$"),
        ({"r": 0}, r"^expected an int >= 1 in `r`, got 0$"),
        ({"r": 2.0}, r"^expected an int >= 1 in `r`, got 2\.0$"),
        ({"alpha": 0}, r"^expected a positive, finite number in `alpha`, got 0$"),
        ({"dropout": 1.0}, r"^expected a probability in \[0, 1\) in `dropout`, got 1\.0$"),
        ({"kind": "network"}, r"^expected a `factorization` with kind='network', got none$"),
        ({"kind": "flora", "factorization": "tt"}, r"^expected no `factorization` with kind='flora', .* got 'tt'$"),
        ({"rank": 4}, r"^expected a `factorization` with `rank`, got 4 without one$"),
        ({"modes": {32: [8, 4]}}, r"^expected a `factorization` with `modes`, got \{32: \[8, 4\]\} without one$"),
        ({"factorization": "tq"}, r"^expected one of .*'tt'.* in `factorization`, got 'tq'"),
        ({"factorization": "tt", "modes": {32: [8.5]}}, r"^expected a list of positive ints in `modes\[32\]`, got"),
        ({"r": 33}, r"^expected an int of at most 32 in `r` for a weight of 32 × 32, got 33 in first$"),
        (
            {"factorization": "tt", "modes": {32: [8, 8]}},
            r"^expected modes with the product 128 for 32 × 4 in `modes`, such as \[4, 4, 4, 2\], got \[8, 8\] "
            r"with the product 64 in first$",
        ),
        (
            {"factorization": "tt", "rank": 100},
            r"^expected an int of at most \d+ in `rank` for the modes \(.*\) of tt, got 100 in first$",
        ),
        (
            {"kind": "network", "factorization": "tt", "modes": {32: [4, 4]}},
            r"^expected modes with the product 32 for 32 in `modes`, such as \[4, 2, 2, 2\], got \[4, 4\] with the "
            r"product 16 in first$",
        ),
        ({"factorization": "tt", "rank": [4, 4, 4, 4, 4]}, r"^expected 1 int in `rank` .* in first$"),
        ({"target_modules": ["conv"]}, r"^expected a torch\.nn\.Linear, .* as a target, got a Conv1d in conv$"),
        ({"target_modules": ["third"]}, r"^Target modules \{'third'\} not found in the base model"),
    ],
)
def test_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        adapted(**settings)


def test_quantized_weights_are_refused():
    net = Net()
    net.first.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"with a floating-point weight, got a Linear of torch\.int8 in first$"):
        get_peft_model(net, TensorAdapterConfig(target_modules=["first"]))


def test_merging_into_a_reconstructed_weight_is_refused():
    net = Net()
    apply_(net, plan(net, factorization="tt", ranks=4))
    x = torch.randn(2, 32)
    before = net(x)
    model = get_peft_model(net, TensorAdapterConfig(target_modules=["first"], init_weights=False, r=2))
    assert not torch.allclose(model(x), before)
    with pytest.raises(
        TypeError, match=r"^expected a layer with a weight of its own to merge into, got a TensorizedLinear"
    ):
        model.merge_adapter()


def test_a_merge_that_is_not_finite_changes_nothing_with_safe_merge():
    model = adapted(init_weights=False)
    layer = model.base_model.model.first
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.tensor_adapter_update["default"].cores()[0].fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^expected finite weights after merging in `adapter_names`, got NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


class TestFiles:
    def load(self, folder, width=32):
        return PeftModel.from_pretrained(Net(width), folder)

    @pytest.fixture
    def folder(self, tmp_path):
        adapted(factorization="tt", init_weights=False).save_pretrained(tmp_path)
        return tmp_path

    def test_of_a_model_with_other_sizes(self, folder):
        with pytest.raises(ValueError, match=r"^expected .* in the file of adapter weights, got "):
            self.load(folder, width=64)

    def test_of_another_kind(self, folder, tmp_path_factory):
        other = tmp_path_factory.mktemp("other")
        adapted(kind="flora").save_pretrained(other)
        shutil.copy(other / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"^expected the \d+ tensors of this adapter in the file .* got none for"):
            self.load(folder)

    def test_with_more_layers(self, folder, tmp_path_factory):
        other = tmp_path_factory.mktemp("other")
        adapted(factorization="tt", target_modules=["first", "second"]).save_pretrained(other)
        shutil.copy(other / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        with pytest.raises(
            ValueError, match=r"^expected the \d+ tensors .* got '.*second.*' and 3 others, which it does not have$"
        ):
            self.load(folder)

    def test_that_are_truncated(self, folder):
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(Exception, match=r"header|incomplete|deserializing"):
            self.load(folder)
