"""Adapters in models of transformers and torchvision, through the doors that users know."""

import copy

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra text: pip install tenzoo[text]")

from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torchvision.models import VisionTransformer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tenzoo.adapters import TensorAdapterConfig, TensorAdapterLayer
from tenzoo.cores import find_core_groups

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing:FutureWarning",  # names that transformers renames
    "ignore:.*save_embedding_layers:UserWarning",
)

KINDS = {
    "lora": {},
    "flora": {"kind": "flora"},
    "loretta": {"factorization": "tt", "rank": 4},
    "network": {"kind": "network", "factorization": "tr", "rank": 3},
}


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=60,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            num_labels=3,
        )
    )


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=48, n_layer=2, n_head=4))


def llama():
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=2, **sizes))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def logits(model, ids):
    more = {"decoder_input_ids": ids} if "T5" in type(model).__name__ or hasattr(model, "decoder") else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@torch.no_grad()
def randomize_(model):
    for name, parameter in model.named_parameters():
        if "tensor_adapter_update" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture
def ids():
    return torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [bert, gpt2, llama, t5])
def test_architectures_that_peft_knows_need_no_targets(make, kind, ids):
    torch.manual_seed(0)
    base = make().eval()
    model = get_peft_model(copy.deepcopy(base), TensorAdapterConfig(r=4, **KINDS[kind])).eval()
    own = model.base_model.model
    assert torch.equal(logits(own, ids), logits(base, ids))
    randomize_(model)
    expected = logits(own, ids)
    assert not torch.equal(expected, logits(base, ids))
    assert len(find_core_groups(model)) == sum(isinstance(m, TensorAdapterLayer) for m in model.modules()) > 0
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_adapters_itself(kind, ids, tmp_path):
    torch.manual_seed(0)
    base = llama().eval()
    model = get_peft_model(copy.deepcopy(base), TensorAdapterConfig(r=4, **KINDS[kind])).eval()
    randomize_(model)
    model.save_pretrained(tmp_path)
    before = logits(base, ids)
    base.load_adapter(str(tmp_path))
    after = logits(base.eval(), ids)
    assert torch.equal(after, logits(model.base_model.model, ids))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_activations_trains_the_same(ids, reentrant):
    torch.manual_seed(0)
    model = get_peft_model(llama(), TensorAdapterConfig(r=4, factorization="tt", rank=4, init_weights=False)).train()

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), expected)


def test_a_model_that_is_no_transformers_model(tmp_path):
    torch.manual_seed(0)
    vit = VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=3
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    before = vit(images)
    config = TensorAdapterConfig(r=4, factorization="tt", rank=4, target_modules=["mlp.0", "mlp.3"])
    inject_adapter_in_model(config, vit)
    assert torch.equal(vit(images), before)
    assert len(find_core_groups(vit)) == 4
    vit(images).sum().backward()


def test_a_new_head_is_trained_and_saved(ids, tmp_path):
    torch.manual_seed(0)
    base = bert().eval()
    config = TensorAdapterConfig(r=4, kind="flora", target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(loaded.base_model.model, ids), logits(model.base_model.model, ids))


def test_the_weight_of_a_tied_embedding_is_merged_for_both(ids):
    torch.manual_seed(0)
    base = gpt2().eval()
    config = TensorAdapterConfig(r=4, target_modules=["c_attn"])
    model = get_peft_model(copy.deepcopy(base), config).eval()
    randomize_(model)
    expected = logits(model.base_model.model, ids)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-5, rtol=1e-5)
