"""A training step of a small transformer with adapters made of cores, against PEFT's LoRA."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.methods import methods_in_turns
from benchmarks.report import Ratio, Report, Table
from benchmarks.steps import Step, in_turns, saved_bytes
from tenzoo.tasks import SAM, TextClassificationTask

SETTINGS: Mapping[str, dict[str, Any]] = {
    "LoRA": {},
    "FLoRA": {"kind": "flora"},
    "LoRETTA-rep": {"factorization": "tt", "rank": 5},
    "TT of ΔW": {"kind": "network", "factorization": "tt"},
    "LoRETTA-adp": {"kind": "bottleneck", "factorization": "tt", "rank": 5, "target_modules": ["output.dense"]},
}
_TARGETS = {"LoRA": 1.05, "FLoRA": 1.05, "LoRETTA-rep": 1.2, "TT of ΔW": 1.25}
_PEFT = "PEFT's LoRA"
_BYTES = 4 * 4
"""Of a trained parameter, its gradient and Adam's two moments."""


class _Classifier(nn.Module):
    """Logits of a Hugging Face model, from tokens alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


def adapters(
    rounds: int, *, batch: int = 16, length: int = 64, layers: int = 6, width: int = 384, r: int = 8
) -> Report:
    """Train adapters of query and value of a BERT of MiniLM's sizes, whose numbers are random.

    Args:
        rounds: How often each variant has its turn.
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        layers: Of the transformer.
        width: Of the transformer.
        r: Inner width of the adapters, and the rank of the network of ΔW.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, (batch, length), generator=generator)
    labels = torch.randint(2, (batch,), generator=generator)
    networks = _networks(layers, width, r)
    times = in_turns({name: _step(network, tokens, labels) for name, network in networks.items()}, rounds)
    times |= under_lightning(networks["LoRETTA-rep"], tokens, labels, rounds)
    ratios = [
        *(Ratio.of(times, name, _PEFT, target=_TARGETS.get(name)) for name in SETTINGS),
        Ratio.of(times, "LoRETTA-rep, DAS", "LoRETTA-rep, Lightning", target=1.02),
        Ratio.of(times, "LoRETTA-rep, SAM", "LoRETTA-rep, Lightning", target=2.05),
    ]
    title = f"adapters: a step of a BERT of {layers} layers and width {width}"
    note = (
        f"Batch {batch}, length {length}, float32, r = {r}, AdamW, query and value; the bottlenecks follow attention "
        "and feed-forward. The frozen transformer takes nearly all of a step: an adapter adds the launches of its "
        "operations. The last three variants are under Lightning, without loggers."
    )
    return Report(title, note, ("ms/step", 1e3), times, ratios, [_table(networks, tokens, labels)])


def _networks(layers: int, width: int, r: int) -> dict[str, nn.Module]:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    from tenzoo.adapters import TensorAdapterConfig

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    base = BertForSequenceClassification(BertConfig(vocab_size=1000, num_attention_heads=12, **sizes))
    common: dict[str, Any] = {"r": r, "target_modules": ["query", "value"]}
    configs = {_PEFT: LoraConfig(**common)}
    configs |= {name: TensorAdapterConfig(**{**common, **settings}) for name, settings in SETTINGS.items()}
    return {name: _Classifier(get_peft_model(copy.deepcopy(base), config)) for name, config in configs.items()}


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _step(network: nn.Module, tokens: Tensor, labels: Tensor) -> Step:
    optimizer = _adamw(_trained(network))

    def step() -> None:
        loss = F.cross_entropy(network(tokens), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def under_lightning(
    network: nn.Module, tokens: Tensor, labels: Tensor, rounds: int, steps: int = 2, warmup: int = 2
) -> dict[str, list[float]]:
    """Train plainly, with DAS and with SAM, in turns; the three share the frozen weights.

    Args:
        network: Maps tokens to logits; its adapters are of the kind LoRETTA-rep.
        tokens: ``(N, length)``.
        labels: ``(N,)``.
        rounds: How often each has its turn.
        steps: In a turn.
        warmup: Steps before the first turn.

    Returns:
        Seconds per step, by name.
    """
    frozen = {id(p): p for p in network.parameters() if not p.requires_grad}

    def make(sam: SAM | None) -> TextClassificationTask:
        return TextClassificationTask(copy.deepcopy(network, {**frozen}), optimizer=_adamw, sam=sam)

    return methods_in_turns(
        "LoRETTA-rep",
        make,
        {"tokens": tokens, "labels": labels},
        rounds,
        alpha=0.5,
        rho=0.05,
        steps=steps,
        warmup=warmup,
        accelerator="gpu" if tokens.is_cuda else "cpu",
    )


def _adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-4)


def _table(networks: Mapping[str, nn.Module], tokens: Tensor, labels: Tensor) -> Table:
    peft = 0
    rows = []
    for name, network in networks.items():
        saved = saved_bytes(network, (tokens, labels))
        parameters = sum(parameter.numel() for parameter in _trained(network))
        peak = saved + _BYTES * parameters
        peft = peft or peak
        ratio = Ratio(name, (peak / peft,), None if name == _PEFT else 1.0)
        rows.append(
            [name, f"{parameters:,}", f"{saved / 1e6:.1f}", f"{peak / 1e6:.1f}", f"{ratio.median:.3f}", ratio.verdict]
        )
    header = (
        "adapters",
        "parameters",
        "MB saved for the backward pass",
        "with parameters, gradients and Adam",
        f"/ {_PEFT}",
        "target",
    )
    return header, rows
