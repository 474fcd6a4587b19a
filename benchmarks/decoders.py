"""A training step of a language model, dense and of trains, and its generation of text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.methods import methods_in_turns
from benchmarks.report import Ratio, Report, Table
from benchmarks.steps import Step, in_turns, on_threads, saved_bytes
from tenzoo.models import Decoder
from tenzoo.models.generation import Continuation
from tenzoo.tasks import CausalLMTask

FORMATS: Mapping[str, str | None] = {"dense": None, "TT": "tt", "BTT": "btt"}
_TOKENS = 65
_NOTE = (
    "Decoders of 4 blocks, 4 heads and a SwiGLU of twice the width, on {batch} × {context} random characters, AdamW, "
    "{threads} threads; embeddings are dense. A budget is the part of the dense model's parameters. A step is forward, "
    "cross-entropy, backward and the optimizer's. Attention, norms and rotations are the same in all of them. "
    "Generation is of {length} characters from one, one after the other, with keys and values kept; weights are "
    "rebuilt once. The last three variants are under Lightning, without loggers."
)


def decoders(
    rounds: int,
    *,
    widths: Mapping[int, float] | None = None,
    batch: int = 32,
    context: int = 256,
    depth: int = 4,
    length: int = 500,
    threads: int = 2,
) -> Report:
    """Train decoders of several widths and formats, generate with them, and train one with DAS and SAM.

    Args:
        rounds: How often each variant has its turn.
        widths: The budget of each width.
        batch: Blocks of a batch.
        context: Tokens of a block.
        depth: Blocks of a decoder.
        length: Tokens that are generated.
        threads: To compute on.
    """
    widths = widths or {128: 0.2, 512: 0.25}
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(_TOKENS, (batch, context), generator=generator) for _ in range(2))
    times: dict[str, list[float]] = {}
    ratios: list[Ratio] = []
    rows: list[list[str]] = []

    def make(name: str, width: int) -> Decoder:
        torch.manual_seed(0)
        cores: dict[str, Any] = {}
        if FORMATS[name] is not None:
            parts = dict.fromkeys(("attention", "feed_forward"), FORMATS[name])
            cores = {"factorization": parts, "budget": widths[width]}
        return Decoder(_TOKENS, width=width, hidden_width=2 * width, depth=depth, context=max(context, length), **cores)

    with on_threads(threads):
        for width, target in zip(widths, (1.1, 0.9), strict=False):
            models = {name: make(name, width) for name in FORMATS}
            times |= in_turns(
                {f"{name} {width}": _step(model, tokens, targets) for name, model in models.items()}, rounds
            )
            ratios += [Ratio.of(times, f"{name} {width}", f"dense {width}", target=target) for name in ("TT", "BTT")]
            rows += [_row(f"{name} {width}", model, tokens, targets, times) for name, model in models.items()]
        for width in widths:
            names = {f"generation, {name} {width}": name for name in FORMATS}
            times |= in_turns({key: _generation(make(name, width), length) for key, name in names.items()}, rounds)
            dense = f"generation, dense {width}"
            ratios += [Ratio.of(times, key, dense, target=1 / 0.95) for key in names if key != dense]
        first = next(iter(widths))
        times |= methods_in_turns(
            f"BTT {first}",
            lambda sam: CausalLMTask(make("BTT", first), optimizer=_adamw, sam=sam),
            {"tokens": tokens, "targets": targets},
            rounds,
            alpha=0.01,
            rho=0.05,
        )
    ratios += [
        Ratio.of(times, f"BTT {first}, DAS", f"BTT {first}, Lightning", target=1.02),
        Ratio.of(times, f"BTT {first}, SAM", f"BTT {first}, Lightning", target=2.05),
    ]
    note = _NOTE.format(batch=batch, context=context, threads=threads, length=length)
    table: Table = (("model", "parameters", "tokens/s in training", "MB saved for the backward pass"), rows)
    return Report("decoders: language models, of trains and dense", note, ("ms/step", 1e3), times, ratios, [table])


def _adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _step(model: Decoder, tokens: Tensor, targets: Tensor) -> Step:
    optimizer = _adamw(model.parameters())

    def step() -> None:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _generation(model: Decoder, length: int) -> Step:
    prompt, continuation = torch.zeros(1, 1, dtype=torch.long), Continuation(temperature=0, length=length)
    return lambda: list(continuation.of(model.eval(), prompt))


class _Flat(torch.nn.Module):
    """Logits of all tokens of a batch as one list."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        return logits.flatten(0, 1)


def _row(name: str, model: Decoder, tokens: Tensor, targets: Tensor, times: Mapping[str, Sequence[float]]) -> list[str]:
    speed = tokens.numel() / sorted(times[name])[len(times[name]) // 2]
    saved = saved_bytes(_Flat(model), (tokens, targets.flatten()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [name, f"{parameters:,}", f"{speed:,.0f}", f"{saved / 1e6:.1f}"]
