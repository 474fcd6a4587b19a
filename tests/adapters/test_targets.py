"""Layers whose weights torch reads without calling them, and what "all-linear" takes."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs the extra text: pip install tenzoo[text]")

from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from tenzoo.adapters import TensorAdapterConfig, TensorAdapterLayer

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # transformers renames it

KINDS = {
    "lora": {},
    "flora": {"kind": "flora"},
    "loretta": {"factorization": "tt", "rank": 3},
    "network": {"kind": "network", "factorization": "tt", "rank": 3},
    "bottleneck": {"kind": "bottleneck"},
}


def encoder(nested=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


def targets(model, adapter="default"):
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, TensorAdapterLayer) and adapter in module.tensor_adapter_update
    }


def test_all_linear_leaves_out_the_projection_that_attention_reads():
    model = get_peft_model(encoder(), TensorAdapterConfig(target_modules="all-linear"))
    assert targets(model) == {f"layers.{block}.linear{number}" for block in (0, 1) for number in (1, 2)}


@pytest.mark.parametrize("names", [["out_proj"], ["linear1", "out_proj"], r".*out_proj"])
def test_the_projection_that_attention_reads_is_refused_by_name(names):
    model = encoder()
    message = (
        r"^expected a torch\.nn\.Linear, .* got a NonDynamicallyQuantizableLinear, whose weight "
        r"torch\.nn\.MultiheadAttention reads past any adapter in layers\.0\.self_attn\.out_proj$"
    )
    with pytest.raises(TypeError, match=message):
        get_peft_model(model, TensorAdapterConfig(target_modules=names))
    assert not any(isinstance(module, TensorAdapterLayer) for module in model.modules())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_adapters_in_an_encoder_of_torch_act_in_evaluation_as_in_training(kind, nested):
    base = encoder(nested)
    x = torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    config = TensorAdapterConfig(r=4, target_modules="all-linear", init_weights=False, **KINDS[kind])
    model = get_peft_model(copy.deepcopy(base), config)
    expected = model.train()(x, src_key_padding_mask=padding)[~padding]
    assert not torch.allclose(expected, base(x, src_key_padding_mask=padding)[:, :5][~padding], atol=1e-2)
    model.eval()
    with torch.no_grad():
        given = copy.deepcopy(model)(x, src_key_padding_mask=padding)
    torch.testing.assert_close(given[~padding], expected, atol=1e-5, rtol=1e-5)
    if kind != "bottleneck":
        merged = model.merge_and_unload()(x, src_key_padding_mask=padding)
        torch.testing.assert_close(merged[~padding], expected, atol=1e-5, rtol=1e-5)


def test_a_second_adapter_takes_all_linear_layers_as_the_first_did():
    config = TensorAdapterConfig(target_modules="all-linear")
    base = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    model = get_peft_model(base, copy.deepcopy(config))
    model.add_adapter("second", copy.deepcopy(config))
    assert len(targets(model)) == 8
    assert targets(model, "second") == targets(model)
