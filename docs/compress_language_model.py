"""Compress a pretrained causal language model, and print its perplexity before and after.

    python docs/compress_language_model.py MODEL --calibration FILE --test FILE [--factors 1.25 1.5 2] [--fit STEPS]

MODEL is a folder of transformers, or of one GGUF file. FILE is a text; without files the model samples texts itself.
All linear layers and the embedding are decomposed; the budget counts all parameters. "svd" is the truncated SVD, two
factors for each matrix, with ranks chosen as for the others. Rows: by the weights alone, the plain SVD; calibrated on
the logits; with the cores refined so that the square roots of the probabilities come near the dense ones, whose squared
distance is about a quarter of the Kullback-Leibler divergence; and with --fit, all parameters trained for a number of
steps of 8 blocks on the same texts, with Adam, SAM and DAS. All texts but those of the test are the same.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.compression import apply_, plan, refine_
from tenzoo.tasks import SAM, CausalLMTask

FORMATS = {"svd": "ar,rb->ab"}
"""Of this script; others are tenzoo's own."""


class Logits(nn.Module):
    """Logits of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """For tokens ``(N, T)``."""
        return self.model(input_ids=tokens, use_cache=False).logits


class Roots(Logits):
    """Square roots of the probabilities of the next tokens, ``(N, T, num_tokens)``."""

    def forward(self, tokens: Tensor) -> Tensor:
        """For tokens ``(N, T)``."""
        return (super().forward(tokens).log_softmax(-1) / 2).exp()


def loaded(folder: str) -> tuple[nn.Module, Any]:
    """The model in float32, and its tokenizer."""
    gguf = [path.name for path in Path(folder).glob("*.gguf")]
    arguments = {"gguf_file": gguf[0]} if gguf else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments).eval()
    return model, AutoTokenizer.from_pretrained(folder, **arguments)


def blocks(tokens: Tensor, length: int, number: int) -> Tensor:
    """The first blocks of a text, ``(number, length)``."""
    return tokens[: len(tokens) // length * length].view(-1, length)[:number]


@torch.no_grad()
def sampled(model: Any, number: int, length: int, seed: int) -> Tensor:
    """Texts that the model writes itself, from its first token on."""
    torch.manual_seed(seed)
    start = torch.full((number, 1), model.config.bos_token_id)
    return model.generate(start, do_sample=True, top_k=0, min_new_tokens=length - 1, max_new_tokens=length - 1)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """Of all tokens but the first of each block."""
    loss = count = 0.0
    for part in tokens.split(8):
        logits = model.eval()(input_ids=part).logits[:, :-1]
        loss += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        count += part[:, 1:].numel()
    return float(torch.tensor(loss / count).exp())


def fitted(model: nn.Module, tokens: Tensor, steps: int, *, method: str) -> nn.Module:
    """A copy that is trained on the blocks, 8 a step."""
    model = copy.deepcopy(model)
    sam = SAM(rho=0.02) if method == "SAM" else None
    callbacks = [DeviationAwareScaling(alpha=0.02)] if method == "DAS" else []
    task = CausalLMTask(Logits(model), optimizer=_adam, lr_scheduler="cosine", gradient_clip_val=1.0, sam=sam)

    def batches() -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            chosen = tokens[torch.randperm(len(tokens), generator=generator)[:8]]
            yield {"tokens": chosen[:, :-1], "targets": chosen[:, 1:]}

    data: DataLoader[Any] = DataLoader(list(batches()), batch_size=None)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet).fit(task, data)
    return model


def _adam(parameters: Any) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=1e-3)


def main() -> None:
    """Print one row per way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--formats", nargs="+", default=["svd", "btt"])
    parser.add_argument("--factors", nargs="+", type=float, default=[1.25, 1.5, 2.0])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--number", type=int, default=128, help="blocks to train on")
    parser.add_argument("--calibrated", type=int, default=128, help="of them to calibrate and refine with")
    parser.add_argument("--test_number", type=int, default=128)
    parser.add_argument("--fit", type=int, default=0)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dense, tokenizer = loaded(given.model)

    def texts(file: Path | None, number: int, seed: int) -> Tensor:
        if file is None:
            return sampled(dense, number, given.length, seed)
        tokens = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
        return blocks(tokens, given.length, number)

    seen, held_out = texts(given.calibration, given.number, 0), texts(given.test, given.test_number, 1)
    before = time.process_time()

    def row(format_: str, factor: float, way: str, model: nn.Module) -> None:
        nonlocal before
        seconds = time.process_time() - before
        size = sum(p.numel() for p in model.parameters())
        print(
            f"| {format_} | {factor:g} | {way} | {size:,} | {perplexity(model, held_out):.2f} | {seconds:.0f} s |",
            flush=True,
        )
        before = time.process_time()

    print("| format | ÷ | | parameters | perplexity | CPU time |\n|---|---:|---|---:|---:|---:|")
    row("dense", 1, "", dense)
    for factor in given.factors:
        for name in given.formats:
            settings: dict[str, Any] = {"factorization": FORMATS.get(name, name), "budget": 1 / factor}
            row(name, factor, "by the weights alone", apply_(copy.deepcopy(dense), plan(dense, **settings)))
            small = Logits(copy.deepcopy(dense))
            part: DataLoader[Any] = DataLoader(seen[: given.calibrated], batch_size=4)  # what a pass has in memory
            apply_(small, plan(small, **settings, calibration=part), calibration=part)
            row(name, factor, "calibrated", small.model)
            refine_(Roots(small.model), Roots(dense), calibration=part)
            row(name, factor, "and refined", small.model)
            for method in ("Adam", "SAM", "DAS") if given.fit else ():
                row(name, factor, f"and trained with {method}", fitted(small.model, seen, given.fit, method=method))


if __name__ == "__main__":
    main()
