"""Numbers of parameters as published, counted without memory."""

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra text: pip install tenzoo[text]")

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, OPTConfig, RobertaConfig

from tenzoo.adapters import TensorAdapterConfig

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers


def count(model):
    return sum(p.numel() for name, p in model.named_parameters() if "tensor_adapter_update" in name)


def test_loretta_rep_on_opt_6_7b():
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16384}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OPTConfig(**sizes, word_embed_proj_dim=4096))
        config = TensorAdapterConfig(
            r=8,
            factorization="tt",
            rank=16,
            modes={4096: [16, 16, 8, 4, 4]},
            target_modules=["q_proj", "v_proj"],
        )
        assert count(get_peft_model(model, config)) == 958_464


def test_flora_on_roberta_large():
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(RobertaConfig(**sizes))
        assert count(get_peft_model(model, TensorAdapterConfig(kind="flora", r=8))) == 789_504


@pytest.mark.parametrize(("width", "modes", "expected"), [(768, [8, 8, 12, 8], 1160), (4096, [16, 16, 8, 4, 4], 1600)])
def test_loretta_adp_per_layer(width, modes, expected):
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 8, "intermediate_size": 4 * width}
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(BertConfig(**sizes))
        config = TensorAdapterConfig(
            kind="bottleneck",
            factorization="tt",
            rank=5,
            modes={width: modes},
            target_modules=["attention.output.dense", "output.dense"],
        )
        assert count(get_peft_model(model, config)) == 2 * expected  # after attention, and after feed-forward
