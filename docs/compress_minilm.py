"""Compress the sentence embeddings of MiniLM to half of all parameters, and print how near they stay to the dense ones.

    python docs/compress_minilm.py FOLDER_OF_MODEL FOLDER_OF_GLUE [--sentences 512]

Rows: decomposed by the weights alone; with sentences of the train splits of SST-2 and RTE as calibration data; with the
cores fitted to the dense embeddings of the same sentences; and with LoRA adapters of all linear layers trained for one
epoch on the dense embeddings of 4,096 other sentences, the cores frozen or not. No row uses labels. The measure is the
mean cosine of the embedding to the dense one, over 400 sentences of the dev splits.
"""

import argparse
import copy
import csv
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModel, AutoTokenizer

import tenzoo.adapters
from tenzoo.compression import apply_, plan, refine_

TRAINED_ON, TESTED_ON, BATCH = 4096, 400, 32
ADAPTER = {"target_modules": "all-linear", "r": 8, "alpha": 16}


class Sentence(nn.Module):
    """The mean of the last hidden states over the tokens of a sentence, of norm 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings ``(N, 384)``."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def sentences(folder: Path, split: str) -> list[str]:
    """As many of SST-2 as of RTE in turn, in an order that is always the same."""
    generator = torch.Generator().manual_seed(0)
    columns = []
    for task, names in (("SST-2", ["sentence"]), ("RTE", ["sentence1", "sentence2"])):
        with (folder / task / f"{split}.tsv").open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        texts = [row[name] for name in names for row in rows]
        columns.append([texts[k] for k in torch.randperm(len(texts), generator=generator).tolist()])
    return [text for pair in zip(*columns, strict=False) for text in pair]


class Tokens:
    """Tokens of sentences, as the tokenizer pads them."""

    def __init__(self, model: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        """The arguments of one call."""
        arguments = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        found = self.tokenizer(texts, **arguments)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def batches(self, texts: list[str]) -> list[dict[str, Tensor]]:
        """Batches of sentences of like length."""
        texts = sorted(texts, key=len)
        return [self(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]


@torch.no_grad()
def cosine(model: nn.Module, dense: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Mean over all sentences."""
    found = [(model.eval()(**batch) * dense(**batch)).sum(1) for batch in batches]
    return float(torch.cat(found).mean())


def adapted(model: nn.Module, dense: nn.Module, batches: list[dict[str, Tensor]], *, frozen: bool) -> nn.Module:
    """A copy with adapters, after one epoch."""
    from peft import inject_adapter_in_model

    torch.manual_seed(0)
    model = copy.deepcopy(model)
    cores = [p for name, p in model.named_parameters() if ".factorization." in name]
    model = inject_adapter_in_model(tenzoo.adapters.TensorAdapterConfig(**ADAPTER), model).eval()
    for core in cores:
        core.requires_grad_(not frozen)
    adapters = [p for p in model.parameters() if p.requires_grad and not any(p is core for core in cores)]
    groups = [{"params": adapters, "lr": 1e-3}] + ([] if frozen else [{"params": cores, "lr": 1e-4}])
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in groups], total_steps=len(batches))
    for k in torch.randperm(len(batches)).tolist():
        with torch.no_grad():
            expected = dense(**batches[k])
        optimizer.zero_grad()
        (1 - (model(**batches[k]) * expected).sum(1)).mean().backward()
        optimizer.step()
        schedule.step()
    return model


def main() -> None:
    """Print one row per way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("glue", type=Path)
    parser.add_argument("--sentences", type=int, default=512)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dense = Sentence(AutoModel.from_pretrained(arguments.model)).eval()
    tokens, texts = Tokens(arguments.model), sentences(arguments.glue, "train")
    inputs = tokens(texts[: arguments.sentences])
    others = tokens.batches(texts[arguments.sentences : arguments.sentences + TRAINED_ON])
    held_out = tokens.batches(sentences(arguments.glue, "dev")[:TESTED_ON])
    start = time.process_time()

    def row(way: str, model: nn.Module) -> None:
        nonlocal start
        seconds = time.process_time() - start
        size = sum(p.numel() for p in model.parameters())
        print(f"| {way} | {size:,} | {cosine(model, dense, held_out):.3f} | {seconds:.0f} s |", flush=True)
        start = time.process_time()

    print("| | parameters | cosine | CPU time |\n|---|---:|---:|---:|")
    row("dense", dense)
    row("by the weights alone", apply_(copy.deepcopy(dense), plan(dense, factorization="tt", budget=0.5)))
    made = plan(dense, factorization="tt", budget=0.5, calibration=inputs)
    small = apply_(copy.deepcopy(dense), made, calibration=inputs)
    row(f"calibrated with {arguments.sentences} sentences", small)
    row("and cores refined on them", refine_(small, dense, calibration=inputs))
    row("and one epoch of adapters, cores frozen", adapted(small, dense, others, frozen=True))
    row("and one epoch of adapters and cores", adapted(small, dense, others, frozen=False))


if __name__ == "__main__":
    main()
