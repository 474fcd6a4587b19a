"""Merging into weights that layers share, and into a part of the layers only."""

import copy
import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs the extra text: pip install tenzoo[text]")

from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tenzoo.adapters import TensorAdapterConfig, TensorAdapterLayer

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft",
    "ignore:`(is_)?gradient_checkpointing:FutureWarning",  # names that transformers renames
)

DTYPES = [torch.float32, torch.bfloat16]
SETTINGS = {"r": 4, "init_weights": False}


class Tied(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self, dtype, by_storage):
        super().__init__()
        self.embed = nn.Embedding(20, 16, dtype=dtype)
        self.head = nn.Linear(16, 20, bias=False, dtype=dtype)
        self.head.weight = nn.Parameter(self.embed.weight.data) if by_storage else self.embed.weight

    def forward(self, index):
        return self.head(self.embed(index))


def adapted(dtype=torch.float32, by_storage=False):
    torch.manual_seed(0)
    config = TensorAdapterConfig(target_modules=["embed", "head"], **SETTINGS)
    model = get_peft_model(Tied(dtype, by_storage), config)
    model.add_adapter("other", copy.deepcopy(config))
    return model.eval()


def layers_of(model):
    return model.base_model.model.embed, model.base_model.model.head


def weight_of(model):
    embed, head = layers_of(model)
    assert torch.equal(embed.weight, head.weight)
    return embed.weight.detach().clone()


def merged_alone(layer, name, dtype):
    return (layer.weight.float() + layer.get_delta_weight(name)).to(dtype).detach()


@pytest.mark.parametrize("tied_by", ["parameter", "storage"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestSharedWeights:
    @pytest.fixture
    def model(self, dtype, tied_by):
        return adapted(dtype, by_storage=tied_by == "storage")

    def test_unmerging_restores_every_bit(self, model):
        before = weight_of(model)
        for _ in range(2):
            model.merge_adapter()
            assert not torch.equal(weight_of(model), before)
            model.unmerge_adapter()
            assert torch.equal(weight_of(model), before)

    def test_in_every_order_each_layer_takes_back_its_own(self, model, dtype):
        before = weight_of(model)
        alone = {layer: merged_alone(layer, "default", dtype) for layer in layers_of(model)}
        for merging, unmerging in itertools.product(itertools.permutations(layers_of(model)), repeat=2):
            for layer in merging:
                layer.merge()
            first, last = unmerging
            first.unmerge()
            assert torch.equal(weight_of(model), alone[last])
            last.unmerge()
            assert torch.equal(weight_of(model), before)

    def test_several_adapters_merged_one_after_the_other(self, model):
        before = weight_of(model)
        embed, head = layers_of(model)
        embed.merge(adapter_names=["default"])
        head.merge(adapter_names=["other"])
        head.merge(adapter_names=["default"])
        embed.merge(adapter_names=["other"])
        both = weight_of(model)
        embed.unmerge()
        embed.merge(adapter_names=["default", "other"])
        tolerance = 1e-5 if both.dtype == torch.float32 else 0.1
        torch.testing.assert_close(weight_of(model), both, atol=tolerance, rtol=tolerance)
        head.unmerge()
        embed.unmerge()
        assert torch.equal(weight_of(model), before)

    def test_an_adapter_that_is_scaled_after_it_was_merged(self, model, dtype):
        before = weight_of(model)
        embed, head = layers_of(model)
        alone = merged_alone(embed, "default", dtype)
        model.merge_adapter()
        embed.set_scale("default", 3)
        head.unmerge()
        assert torch.equal(weight_of(model), alone)
        embed.unmerge()
        assert torch.equal(weight_of(model), before)


@pytest.mark.parametrize("merge", [lambda model: model.merge_adapter(), lambda model: layers_of(model)[1].merge()])
def test_a_copy_of_a_model_of_which_one_layer_is_merged(merge):
    model = adapted()
    before = weight_of(model)
    layers_of(model)[0].merge()
    merged = weight_of(model)
    other = copy.deepcopy(model)
    merge(other)
    for layer in layers_of(other):
        layer.unmerge()
    assert torch.equal(weight_of(other), before)
    assert torch.equal(weight_of(model), merged)


def test_llama_with_a_tied_head():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=True, **sizes))
    config = TensorAdapterConfig(target_modules=["embed_tokens", "lm_head"], **SETTINGS)
    model = get_peft_model(base, config).eval()
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    tied = model.base_model.model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_other_weights_of_one_storage_are_their_own():
    """Parts of one tensor, such as those of a fused layer."""
    fused = torch.randn(32, 16)
    layers = []
    for part in fused.chunk(2):
        layer = nn.Linear(16, 16, bias=False)
        layer.weight = nn.Parameter(part)
        layers.append(TensorAdapterLayer(layer, "a", TensorAdapterConfig(**SETTINGS)))
    before = fused.clone()
    for layer in layers:
        layer.merge()
    layers[0].unmerge()
    assert torch.equal(fused[:16], before[:16])
    assert not torch.equal(fused[16:], before[16:])
    layers[1].unmerge()
    assert torch.equal(fused, before)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.second(self.first(x))


class TestAMergeThatFails:
    """It changes no layer, also none before the one that fails."""

    def check(self, model, message, merge):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises((TypeError, ValueError), match=message):
            merge(model)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
        layers = [module for module in model.modules() if isinstance(module, TensorAdapterLayer)]
        assert len(layers) == 2
        assert not any(layer.merged for layer in layers)

    @pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
    def test_with_a_bottleneck_in_a_later_layer(self, method):
        model = get_peft_model(Pair(), TensorAdapterConfig(target_modules=["first"], **SETTINGS))
        model.add_adapter("b", TensorAdapterConfig(kind="bottleneck", target_modules=["second"], **SETTINGS))
        model.base_model.set_adapter(["default", "b"])
        message = r"^expected an adapter that updates a weight, got 'b' of kind 'bottleneck', which cannot be merged$"
        self.check(model, message, lambda model: getattr(model, method)())

    @pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
    @pytest.mark.parametrize("value", [torch.nan, 1e30])
    def test_with_a_later_layer_that_is_not_finite(self, method, value):
        model = get_peft_model(Pair().half(), TensorAdapterConfig(target_modules=["first", "second"], **SETTINGS))
        with torch.no_grad():
            model.base_model.model.second.tensor_adapter_update["default"].cores()[0].fill_(value)
        message = r"^expected finite weights after merging in `adapter_names`, got NaN or infinity from \['default'\]$"
        self.check(model, message, lambda model: getattr(model, method)(safe_merge=True))


class TestPaddingRow:
    KINDS = (
        {},
        {"kind": "flora"},
        {"factorization": "tt", "rank": 3},
        {"kind": "network", "factorization": "tt", "rank": 3},
        {"kind": "network", "factorization": "cp", "rank": 3},
    )

    @pytest.fixture(params=KINDS, ids=str)
    def layer(self, request):
        torch.manual_seed(0)
        config = TensorAdapterConfig(**SETTINGS, **request.param)
        return TensorAdapterLayer(nn.Embedding(20, 16, padding_idx=3), "a", config)

    def test_is_not_updated_and_gives_no_gradient(self, layer):
        cores = layer.tensor_adapter_update["a"].cores()
        padding = torch.full((2, 5), 3)
        assert not layer(padding).any()
        assert not any(gradient.any() for gradient in torch.autograd.grad(layer(padding).sum(), cores))
        with_padding, without = torch.tensor([[1, 3, 2, 3]]), torch.tensor([[1, 2]])
        given = torch.autograd.grad(layer(with_padding).square().sum(), cores)
        torch.testing.assert_close(given, torch.autograd.grad(layer(without).square().sum(), cores))

    def test_stays_zero_in_training_and_after_merging(self, layer):
        optimizer = torch.optim.SGD(layer.tensor_adapter_update["a"].parameters(), 0.01)
        index = torch.arange(20)
        for _ in range(3):
            layer(index).sum().backward()
            optimizer.step()
        expected = layer(index)
        assert expected[:3].any()
        assert not expected[3].any()
        layer.merge()
        torch.testing.assert_close(layer(index), expected)
        assert not layer(index)[3].any()
