"""Reconstructing a dense tensor by a format's own method, against the path that follows from its legs."""

from collections.abc import Callable, Sequence

import torch

from benchmarks.reconstruct import Case, compared, step_of
from benchmarks.report import Report
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
    pairs = {case.name: _pair(case) for case in cases}
    times, ratios = compared(("generic", "own"), pairs, rounds, seconds)
    title = "formats: reconstructing a tensor, forward and backward"
    return Report(title, "The same cores, float32.", ("µs", 1e6), times, ratios)


def _pair(case: Case) -> tuple[Callable[[], None], Callable[[], None]]:
    """One step of the generic method and of the format's own, checked to compute the same."""
    torch.manual_seed(0)
    weight = factorization_class(case.format)(case.shape, case.rank)
    weight.schedule("reconstruct", weight.legs_of_cores, tuple(range(len(weight.shape))))
    methods = (lambda: Factorization.reconstruct(weight), weight.reconstruct)
    torch.testing.assert_close(methods[0](), methods[1](), rtol=1e-3, atol=1e-4)
    parameters, grad = list(weight.parameters()), torch.randn(case.shape)
    generic, own = (step_of(method, parameters, grad) for method in methods)
    return generic, own
