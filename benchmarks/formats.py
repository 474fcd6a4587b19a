"""Reconstructing a dense tensor by a format's own method, against the path that follows from its legs."""

from collections.abc import Sequence

import torch

from benchmarks.loops import BareLoop, Loop, interleave
from benchmarks.reconstruct import Case, calls_within, step_of
from benchmarks.report import Ratio, Report
from tenzoo.factorizations import Factorization, factorization_class

FORMATS = (
    Case((438, 6, 11), "tucker", (8, 6, 8)),
    Case((438, 6, 11), "cp", (8,)),
    Case((438, 6, 11), "tt", (6, 8)),
    Case((4, 4, 4, 9, 4, 4, 4), "tr", (10,) * 7),
    Case((4, 4, 4, 9, 4, 4, 4, 1), "btt", (8, 8, 8)),
    Case((64, 9, 64), "cp", (64,)),
    Case((64, 9, 64), "tucker", (24, 9, 24)),
)


def formats(rounds: int, *, cases: Sequence[Case] = FORMATS, seconds: float = 0.1) -> Report:
    """Reconstruct tensors of the same cores by the method of a format and by the generic one.

    A format keeps its own method only where it is faster.

    Args:
        rounds: How often each variant has its turn.
        cases: What to reconstruct.
        seconds: Length of a turn, about.
    """
    loops: dict[str, Loop] = {}
    for case in cases:
        torch.manual_seed(0)
        weight = factorization_class(case.format)(case.shape, case.rank)
        weight.schedule("reconstruct", weight.legs_of_cores, tuple(range(len(weight.shape))))
        grad = torch.randn(case.shape)
        torch.testing.assert_close(Factorization.reconstruct(weight), weight.reconstruct(), rtol=1e-3, atol=1e-4)
        own = step_of(weight.reconstruct, list(weight.parameters()), grad)
        generic = step_of(lambda weight=weight: Factorization.reconstruct(weight), list(weight.parameters()), grad)
        steps = calls_within(seconds, own)
        loops[f"own, {case.name}"] = BareLoop(own, steps=steps, warmup=steps)
        loops[f"generic, {case.name}"] = BareLoop(generic, steps=steps, warmup=steps)
    times = interleave(loops, rounds)
    ratios = [
        Ratio.of(times, f"generic, {case.name}", f"own, {case.name}", name=f"generic / own, {case.name}")
        for case in cases
    ]
    title = "formats: reconstructing a tensor, forward and backward"
    return Report(title, "The same cores, float32.", ("µs", 1e6), times, ratios)
