"""A step of fine-tuning a language model with LoRETTA-rep, plainly, under DAS and under SAM."""

import torch
from torch import Tensor, nn

from benchmarks.adapters import under_lightning
from benchmarks.report import Ratio, Report


class _NextWord(nn.Module):
    """Logits of two words as the next token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits[:, -1, :2]
        return logits


def finetuning(rounds: int, *, batch: int = 8, length: int = 64, layers: int | None = None) -> Report:
    """Train OPT-6.7B on a GPU, or a model of the sizes of SmolLM2-135M on a CPU; the weights are random numbers.

    Args:
        rounds: How often each variant has its turn.
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        layers: Of the model; by default 32 on a GPU and 30 on a CPU, as published.
    """
    large = torch.cuda.is_available()
    device = "cuda" if large else "cpu"
    name, network = _opt(layers or 32) if large else _smollm2(layers or 30)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, (batch, length), generator=generator).to(device)
    labels = torch.randint(2, (batch,), generator=generator).to(device)
    times = under_lightning(network, tokens, labels, rounds, steps=1, warmup=1)
    ratios = [
        Ratio.of(times, "LoRETTA-rep, DAS", "LoRETTA-rep, Lightning", target=1.1),
        Ratio.of(times, "LoRETTA-rep, SAM", "LoRETTA-rep, Lightning", target=2.1),
    ]
    note = (
        f"Batch {batch}, length {length}, {trained:,} trained parameters of query and value, AdamW. The paper expects "
        "DAS within 5 to 10 % of Adam, and SAM at about twice its time."
    )
    return Report(f"finetuning: a step of {name}", note, ("ms/step", 1e3), times, ratios)


def _smollm2(layers: int) -> tuple[str, nn.Module]:
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from tenzoo.adapters import TensorAdapterConfig

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    config = TensorAdapterConfig(factorization="tt", rank=5, r=8, alpha=16, target_modules=["q_proj", "v_proj"])
    return "SmolLM2-135M, float32", _NextWord(get_peft_model(model, config))


def _opt(layers: int) -> tuple[str, nn.Module]:
    from peft import get_peft_model
    from transformers import OPTConfig, OPTForCausalLM

    from tenzoo.adapters import TensorAdapterConfig

    sizes = {"hidden_size": 4096, "num_hidden_layers": layers, "num_attention_heads": 32, "ffn_dim": 16384}
    with torch.device("cuda"):
        model = OPTForCausalLM._from_config(OPTConfig(**sizes, word_embed_proj_dim=4096), dtype=torch.bfloat16)
    config = TensorAdapterConfig(
        factorization="tt",
        rank=16,
        r=8,
        alpha=16,
        modes={4096: [16, 16, 8, 4, 4]},
        target_modules=["q_proj", "v_proj"],
    )
    return "OPT-6.7B, bfloat16", _NextWord(get_peft_model(model, config))
