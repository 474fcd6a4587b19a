"""Settings and files that do not fit end in one line, and leave the model as it was."""

import re
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
        *(
            ({"alpha": value}, rf"^expected a positive, finite number in `alpha`, got {value!r}$")
            for value in ("abc", None, True, float("nan"))
        ),
        *(
            ({name: value}, rf"^expected True or False in `{name}`, got {value!r}$")
            for name in ("use_rslora", "init_weights")
            for value in ("no", "maybe", "yes", None, 1)
        ),
        *(
            ({"dropout": value}, rf"^expected a probability in \[0, 1\) in `dropout`, got {value!r}$")
            for value in ("x", None, False)
        ),
        ({"dropout": 1.0}, r"^expected a probability in \[0, 1\) in `dropout`, got 1\.0$"),
        ({"kind": "network"}, r"^expected a `factorization` with kind='network', got none$"),
        ({"kind": "flora", "factorization": "tt"}, r"^expected no `factorization` with kind='flora', .* got 'tt'$"),
        (
            {"kind": "flora", "factorization": "tucker", "rank": 2},
            r"^expected no `rank` with kind='flora', whose core is r × r and whose widths stay whole, got 2$",
        ),
        ({"kind": "flora", "rank": 2}, r"^expected no `rank` with kind='flora', .* got 2$"),
        (
            {"kind": "flora", "factorization": "tucker", "modes": {32: [8, 4]}},
            r"^expected no `modes` with kind='flora', .* got \{32: \[8, 4\]\}$",
        ),
        *(
            ({"factorization": "tt", "modes": value}, rf"^expected a dict from a width to its modes in `modes`, {got}$")
            for value, got in (([1, 2], r"got \[1, 2\]"), ("8", "got '8'"), (8, "got 8"))
        ),
        *(
            ({"factorization": "tt", "modes": {key: [1]}}, rf"^expected widths, .* as keys of `modes`, got {key!r}$")
            for key in ("abc", 32.5, True)
        ),
        (
            {"factorization": "tt", "modes": {32: "84"}},
            r"^expected a list of positive ints in `modes\[32\]`, got '84'$",
        ),
        ({"factorization": "tt", "modes": {32: [True]}}, r"^expected a list of positive ints in `modes\[32\]`, got"),
        (
            {"factorization": "tt", "modes": {32: [16, 8], 9999: [3, 3]}},
            r"^expected widths of the targets in `modes`, which are \[32\], got modes for 9999$",
        ),
        *(
            ({name: value}, rf"^expected a string or a list of strings in `{name}`, got {got}$")
            for name in ("target_modules", "exclude_modules", "layers_pattern")
            for value, got in ((5, "5"), ([5], r"\[5\]"), ({"first": 1}, r"\{'first': 1\}"))
        ),
        ({"modules_to_save": "conv"}, r"^expected a list of strings in `modules_to_save`, got 'conv'$"),
        ({"layers_to_transform": "1"}, r"^expected an int or a list of ints in `layers_to_transform`, got '1'$"),
        (
            {"target_modules": "first", "layers_to_transform": 1},
            r"^expected a list of names in `target_modules` with `layers_to_transform`, .* got 'first'$",
        ),
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
            r"^expected an int of at most \d+ in `rank`, the largest that a layer can use, got 100$",
        ),
        (
            {"kind": "network", "factorization": "tt", "modes": {32: [4, 4]}},
            r"^expected modes with the product 32 for 32 in `modes`, such as \[4, 2, 2, 2\], got \[4, 4\] with the "
            r"product 16 in first$",
        ),
        ({"factorization": "tt", "rank": [4, 4, 4, 4, 4]}, r"^expected 1 int in `rank` .* in first$"),
        ({"target_modules": ["conv"]}, r"^expected a torch\.nn\.Linear, .* as a target, got a Conv1d in conv$"),
        *(
            ({"target_modules": value, **more}, rf"^expected names of layers .* such as 'first', 'second', got {got}$")
            for value, more, got in (
                (["third"], {}, "'third'"),
                (["third", "fourth"], {}, "'fourth', 'third'"),
                ("third", {}, "'third'"),
                ([], {}, "none"),
                (["first"], {"exclude_modules": ["first"]}, r"'first' without `exclude_modules` \{'first'\}"),
            )
        ),
    ],
)
def test_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        adapted(**settings)


@pytest.mark.parametrize("name", ["a.b", "", "keys", "forward"])
@pytest.mark.filterwarnings("ignore:Adapter name:UserWarning")
def test_names_of_adapters(name):
    message = rf"^expected a name without a dot that torch\.nn\.ModuleDict takes in `adapter_name`, got {name!r}$"
    config = TensorAdapterConfig(target_modules=["first"])
    with pytest.raises(ValueError, match=message):
        get_peft_model(Net(), config, adapter_name=name)
    model = adapted()
    with pytest.raises(ValueError, match=message):
        model.add_adapter(name, config)
    assert list(model.peft_config) == ["default"]
    assert model(torch.zeros(1, 32)).isfinite().all()


def test_an_error_about_names_shows_a_few_of_many():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    with pytest.raises(ValueError, match=r"such as '0', '1', '2', '3', '4', '5' and 3 others, got 'zzz'$"):
        get_peft_model(model, TensorAdapterConfig(target_modules=["zzz"]))


def test_blocks_that_are_not_there():
    model = nn.ModuleDict({"body": nn.ModuleDict({"blocks": nn.ModuleList([Net()])})})
    with pytest.raises(ValueError, match=r"got 'first' in the blocks \[1\] of `layers_to_transform`$"):
        get_peft_model(model, TensorAdapterConfig(target_modules=["first"], layers_to_transform=[1]))


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.embed = nn.Linear(32, 32), nn.Conv1d(32, 32, 1), nn.Embedding(8, 32)
        self.last = nn.Linear(8, 8)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["first", "conv"]},
        {"target_modules": ["first"], "factorization": "tt", "modes": {64: [8, 8]}},
        {"target_modules": ["first", "last"], "r": 16},
        {"target_modules": ["first", "embed"], "kind": "bottleneck"},
    ],
    ids=str,
)
def test_settings_that_do_not_fit_a_later_layer_leave_the_model_as_it_was(settings):
    net = Parts()
    names = [name for name, _ in net.named_modules()]
    with pytest.raises((TypeError, ValueError), match=r"^expected "):
        get_peft_model(net, TensorAdapterConfig(**settings))
    assert [name for name, _ in net.named_modules()] == names
    model = get_peft_model(net, TensorAdapterConfig(target_modules=["first"]))
    keys = list(model.state_dict())
    with pytest.raises((TypeError, ValueError), match=r"^expected "):
        model.add_adapter("other", TensorAdapterConfig(**settings))
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"] == model.active_adapters


@pytest.mark.parametrize("modes", [{48: [4, 4, 3, 8]}, {"48": [4, 4, 3, 8]}])
def test_modes_of_a_width_that_only_some_targets_have(modes):
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(32, 32))
    model = get_peft_model(
        model, TensorAdapterConfig(factorization="tt", rank=2, modes=modes, target_modules=["0", "1"])
    )
    assert model.base_model.model[0].tensor_adapter_update["default"].b.factorization.shape == (4, 4, 3, 8)


def test_modes_of_a_bottleneck_are_those_of_the_output():
    model = nn.Sequential(nn.Linear(32, 48))
    config = TensorAdapterConfig(kind="bottleneck", factorization="tt", modes={32: [16, 16]}, target_modules=["0"])
    with pytest.raises(ValueError, match=r"in `modes`, which are \[48\], got modes for 32$"):
        get_peft_model(model, config)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("argument", ["adapter_names", "alora_offsets"])
def test_an_adapter_for_each_sample_is_refused(argument, call):
    model = adapted()
    model.get_base_model().generate = model.get_base_model().forward
    x = torch.zeros(1, 32)
    message = rf"^expected no `{argument}` with adapters of TensorAdapterConfig, .* got \['default'\]; choose one with"
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(x, **{argument: ["default"]})
    assert torch.equal(getattr(model, call)(x, **{argument: None}), model(x))


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

    @pytest.mark.parametrize("size", [0, 5, 100, -10])
    def test_that_are_truncated(self, folder, size):
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:size])
        message = rf"^expected a whole file of adapter weights, got '{re.escape(str(file))}': .*$"
        with pytest.raises(ValueError, match=message):
            self.load(folder)
        model = adapted()
        with pytest.raises(ValueError, match=message):
            model.load_adapter(folder, "again")
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(Net(), folder.parent, subfolder=folder.name)
        assert list(model.peft_config) == ["default"]
