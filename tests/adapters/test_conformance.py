"""Each kind of adapter, in each format, on linear layers, Conv1D and embeddings, as PEFT uses adapters."""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs the extra text: pip install tenzoo[text]")

import peft
from peft import PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

from tenzoo.adapters import TensorAdapterConfig, TensorAdapterLayer
from tenzoo.adapters.updates import Update
from tenzoo.cores import find_core_groups
from tenzoo.factorizations import Factorization

WIDTHS = [312, 384, 768, 1000, 1021]
MERGEABLE = {
    "lora": {"kind": "lora"},
    "flora": {"kind": "flora"},
    **{f"loretta_{name}": {"factorization": name, "rank": 5} for name in ("tt", "tr", "cp", "tucker", "ht")},
    "loretta_einsum": {"factorization": "ar,br,cr,dr->abcd", "rank": 6},
    **{
        f"network_{name}": {"kind": "network", "factorization": name, "rank": 4}
        for name in ("tt", "tr", "btt", "cp", "tucker", "ht", "btd")
    },
    "network_einsum": {"kind": "network", "factorization": "ar,rs,bs->ab", "rank": 5},
}
ALL = {
    **MERGEABLE,
    "loretta_adp": {"kind": "bottleneck", "factorization": "tt", "rank": 5},
    "adp": {"kind": "bottleneck"},
}
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


class Net(nn.Module):
    """Two adapted layers of different widths between others."""

    def __init__(self, width, kind="linear"):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.first = nn.Linear(width, 96) if kind == "linear" else Conv1D(96, width)
        self.second = nn.Linear(96, width)
        self.head = nn.Linear(width, 3)

    def forward(self, index):
        return self.head(self.second(torch.tanh(self.first(self.embed(index)))))


def config(settings, **more):
    return TensorAdapterConfig(**{"r": 8, "alpha": 16, "target_modules": ["first", "second"], **settings, **more})


def adapted(settings, width=384, dtype=torch.float32, kind="linear", **more):
    torch.manual_seed(0)
    net = Net(width, kind).to(dtype).eval()
    return net, get_peft_model(copy.deepcopy(net), config(settings, **more)).eval()


def randomize_(model, scale=0.1):
    """Give every core numbers, so that the update is not small."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tensor_adapter_update" in name:
                parameter.add_(scale * torch.randn_like(parameter))


@pytest.fixture
def index():
    return torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ALL)
class TestEachWidth:
    def test_the_start_is_the_base_model_to_the_bit(self, name, width, dtype, index):
        net, model = adapted(ALL[name], width, dtype)
        assert torch.equal(model(index), net(index))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) > 0

    def test_merging_changes_nothing_and_unmerging_restores_every_bit(self, name, width, dtype, index):
        net, model = adapted(ALL[name], width, dtype)
        randomize_(model, 0.02)
        before = model(index)
        assert not torch.allclose(before, net(index), atol=1e-3)
        if name not in MERGEABLE:
            with pytest.raises(ValueError, match=r"^expected an adapter that updates a weight, got 'default' of kind"):
                model.merge_adapter()
            return
        model.merge_adapter()
        after = model(index)
        tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
        torch.testing.assert_close(after, before, **tolerance)
        model.unmerge_adapter()
        for key, value in net.state_dict().items():
            own = model.base_model.model.state_dict()
            assert torch.equal(own[key] if key in own else own[key.replace(".", ".base_layer.", 1)], value)
        assert torch.equal(model(index), before)


@pytest.mark.parametrize("name", ALL)
class TestEachKind:
    def test_saved_adapters_load_under_another_name_beside_a_second_one(self, name, index, tmp_path):
        net, model = adapted(ALL[name])
        randomize_(model)
        model.save_pretrained(tmp_path)
        expected = model(index)
        loaded = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path, adapter_name="mine").eval()
        assert torch.equal(loaded(index), expected)
        loaded.add_adapter("other", config({"kind": "lora"}, init_weights=False))
        assert torch.equal(loaded(index), expected)
        loaded.set_adapter("other")
        assert not torch.allclose(loaded(index), expected)
        loaded.load_adapter(tmp_path, adapter_name="again")
        loaded.set_adapter("again")
        assert torch.equal(loaded(index), expected)
        loaded.delete_adapter("again")
        loaded.set_adapter("mine")
        assert torch.equal(loaded(index), expected)
        with loaded.disable_adapter():
            assert torch.equal(loaded(index), net(index))
        assert torch.equal(loaded(index), expected)

    def test_an_adapter_loads_without_being_initialized(self, name, index, tmp_path):
        net, model = adapted(ALL[name])
        randomize_(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path, low_cpu_mem_usage=True).eval()
        assert torch.equal(loaded(index), model(index))

    def test_cores_are_found_and_train_alone(self, name, index):
        _, model = adapted(ALL[name])
        groups = find_core_groups(model)
        cores = {id(core) for group in groups for core in group.cores}
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == cores or name == "adp"
        assert len(groups) == {"loretta_adp": 4, "adp": 0}.get(name, 2)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(2):
            model(index).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == {key for key in before if "tensor_adapter_update" in key}

    def test_scaling_is_that_of_lora(self, name):
        _, model = adapted(ALL[name])
        _, rs = adapted(ALL[name], use_rslora=True)
        assert model.base_model.model.first.scaling["default"] == 2
        assert rs.base_model.model.first.scaling["default"] == pytest.approx(16 / 8**0.5)

    def test_dropout_acts_in_training_only(self, name, index):
        _, model = adapted(ALL[name], dropout=0.5, init_weights=False)
        assert torch.equal(model(index), model(index))
        model.train()
        assert not torch.equal(model(index), model(index))

    def test_gradients_are_those_of_the_dense_update(self, name):
        _, model = adapted(ALL[name], dtype=torch.float64)
        randomize_(model)
        layer = model.base_model.model.first
        x = torch.randn(5, 384, dtype=torch.float64, requires_grad=True)
        update = layer.tensor_adapter_update["default"].double()
        cores = update.cores()
        oracle = layer.base_layer(x)
        if isinstance(update, Update):
            oracle = oracle + 2 * x @ update.matrix().t()
        else:
            up, down = (update.up, update.down.t()) if name == "adp" else (update.up(), update.down())
            oracle = oracle + 2 * nn.functional.gelu(oracle @ down) @ up.t()
        weights = torch.randn(5, 96, dtype=torch.float64)
        expected = torch.autograd.grad((oracle * weights).sum(), [x, *cores])
        given = torch.autograd.grad((layer(x) * weights).sum(), [x, *cores])
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)

    def test_conv1d_of_transformers(self, name, index):
        net, model = adapted(ALL[name], kind="conv1d")
        assert torch.equal(model(index), net(index))
        randomize_(model)
        if name in MERGEABLE:
            expected = model(index)
            torch.testing.assert_close(model.merge_and_unload()(index), expected, atol=1e-5, rtol=1e-5)

    def test_embeddings(self, name, index):
        if name not in MERGEABLE:
            with pytest.raises(TypeError, match=r"^expected a linear layer .* got an Embedding in embed$"):
                adapted(ALL[name], target_modules=["embed"])
            return
        net, model = adapted(ALL[name], target_modules=["embed"])
        assert torch.equal(model(index), net(index))
        randomize_(model)
        expected = model(index)
        assert not torch.allclose(expected, net(index))
        torch.testing.assert_close(model.merge_and_unload()(index), expected, atol=1e-5, rtol=1e-5)

    def test_half_precision_bases_train_cores_of_single_precision(self, name, index):
        _, model = adapted(ALL[name], dtype=torch.bfloat16)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        output = model(index)
        output.float().sum().backward()
        assert output.dtype == torch.bfloat16
        assert any(p.grad.any() for p in trained)

    def test_gradient_checkpointing_gives_the_same_gradients(self, name, index):
        _, model = adapted(ALL[name], init_weights=False)
        trained = [p for p in model.parameters() if p.requires_grad]
        expected = torch.autograd.grad(model(index).sum(), trained)
        output = torch.utils.checkpoint.checkpoint(model, index, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(output.sum(), trained), expected)


@pytest.mark.parametrize("name", MERGEABLE)
def test_adapters_convert_to_lora(name, index):
    net, model = adapted(MERGEABLE[name])
    randomize_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora, weights = peft.convert_to_lora(model, rank=96)
        other = get_peft_model(copy.deepcopy(net), lora).eval()
        peft.set_peft_model_state_dict(other, weights)
    torch.testing.assert_close(other(index), model(index), atol=1e-4, rtol=1e-4)


def test_bottlenecks_do_not_convert():
    _, model = adapted(ALL["loretta_adp"])
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=8)


@pytest.mark.parametrize("name", ["loretta_tt", "network_tt"])
def test_a_first_step_of_adam_is_as_large_as_that_of_lora(name):
    """The update's root mean square after one step, from many draws."""

    def size(settings):
        total = 0.0
        for seed in range(20):
            torch.manual_seed(seed)
            layer = TensorAdapterLayer(nn.Linear(384, 384), "a", config(settings))
            update = layer.tensor_adapter_update["a"]
            optimizer = torch.optim.Adam(update.parameters(), 1e-3)
            layer(torch.randn(64, 384)).square().mean().backward()
            optimizer.step()
            total += update.matrix().square().mean().item()
        return (total / 20) ** 0.5

    assert 0.3 < size({**ALL[name], "rank": 8}) / size(ALL["lora"]) < 3


@pytest.mark.parametrize("name", ["loretta_tt", "loretta_cp", "lora"])
def test_the_down_projection_has_the_variance_of_lora(name):
    update = TensorAdapterLayer(nn.Linear(1000, 384), "a", config(ALL[name])).tensor_adapter_update["a"]
    squares = []
    for _ in range(200):
        fresh = TensorAdapterLayer(nn.Linear(1000, 384), "a", config(ALL[name])).tensor_adapter_update["a"]
        squares.append((fresh.a if name == "lora" else fresh.a()).detach().square().mean())
    assert torch.stack(squares).mean().item() == pytest.approx(1 / 3000, rel=0.2)
    assert not update.matrix().any()


def test_flora_starts_as_published():
    """G at zero, A and B at N(0, .02²)."""
    core, *factors = (
        TensorAdapterLayer(nn.Linear(1024, 1024), "a", config(ALL["flora"])).tensor_adapter_update["a"].cores()
    )
    assert core.shape == (8, 8)
    assert not core.any()
    for factor in factors:
        assert factor.shape == (1024, 8)
        assert factor.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("kind", ["lora", "network", "bottleneck"])
def test_a_rank_for_all_layers_is_cut_where_a_small_layer_cannot_use_it(kind):
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6), nn.Linear(6, 2))
    settings = {"kind": kind, "factorization": "tt", "rank": 8, "r": 2}
    model = get_peft_model(copy.deepcopy(net), TensorAdapterConfig(**settings, target_modules=["0", "3"]))

    largest = [max(part.rank, default=1) for part in model.modules() if isinstance(part, Factorization)]
    assert max(largest) == 8
    assert min(largest) < 8
    randomize_(model)
    outputs = model(torch.randn(5, 64))
    outputs.sum().backward()
    assert all(core.grad is not None for group in find_core_groups(model) for core in group.cores)


def test_a_rank_for_all_layers_that_none_can_use_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"of at most \d+ in `rank`, the largest that a layer can use, got 500$"):
        get_peft_model(net, TensorAdapterConfig(r=2, factorization="tt", rank=500, target_modules=["0", "1"]))
    assert [type(part) for part in net] == [nn.Linear, nn.Linear]
