"""Reconstructing a dense tensor from its cores, forward and backward, against tltorch's factorized tensors."""

import contextlib
import importlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorly
import torch
from torch import Tensor, nn

from benchmarks.loops import BareLoop, Loop, interleave
from benchmarks.report import Ratio, Report
from tenzoo.factorizations import Factorization, factorization_class


@dataclass(frozen=True)
class Case:
    """A tensor and the format it is reconstructed from."""

    shape: tuple[int, ...]
    format: str
    rank: tuple[int, ...]

    @property
    def name(self) -> str:
        """Format, rank and shape."""
        return f"{self.format} {self.rank} of {self.shape}".replace(",)", ")")


CASES = (
    Case((438, 6, 11), "tucker", (8, 6, 8)),
    Case((438, 6, 11), "cp", (8,)),
    Case((438, 6, 11), "tt", (6, 8)),
    Case((64, 64, 3, 3), "tucker", (16, 16, 3, 3)),
    Case((64, 64, 3, 3), "cp", (16,)),
    Case((64, 64, 3, 3), "tt", (16, 9, 3)),
    Case((512, 512, 3, 3), "tucker", (128, 128, 3, 3)),
    Case((512, 512, 3, 3), "cp", (128,)),
    Case((512, 512, 3, 3), "tt", (128, 9, 3)),
)


def tltorch(rounds: int, *, cases: Sequence[Case] = CASES, seconds: float = 0.1) -> Report:
    """Reconstruct tensors of the same cores by tenzoo and by tltorch, which the extra ``bench`` installs.

    Args:
        rounds: How often each variant has its turn.
        cases: What to reconstruct.
        seconds: Length of a turn, about.
    """
    with tltorch_library() as library:
        pairs = {case.name: _pair(case, library) for case in cases}
        times, ratios = compared(("tenzoo", "tltorch"), pairs, rounds, seconds)
    title = "tltorch: reconstructing a tensor, forward and backward"
    return Report(title, "The same cores in both libraries, float32.", ("µs", 1e6), times, ratios)


def compared(
    names: tuple[str, str],
    pairs: Mapping[str, tuple[Callable[[], None], Callable[[], None]]],
    rounds: int,
    seconds: float,
) -> tuple[dict[str, list[float]], list[Ratio]]:
    """Times of pairs of steps in turns, and the ratio of the first to the second of each pair.

    Args:
        names: Of the first and the second step.
        pairs: The steps of each case.
        rounds: How often each step has its turn.
        seconds: Length of a turn, about.
    """
    loops: dict[str, Loop] = {}
    for case, steps in pairs.items():
        calls = calls_within(seconds, steps[0])
        for name, step in zip(names, steps, strict=True):
            loops[f"{name}, {case}"] = BareLoop(step, steps=calls, warmup=calls)
    times = interleave(loops, rounds)
    first, second = names
    ratios = [
        Ratio.of(times, f"{first}, {case}", f"{second}, {case}", name=f"{first} / {second}, {case}") for case in pairs
    ]
    return times, ratios


@contextlib.contextmanager
def tltorch_library() -> Iterator[Any]:
    """The library, without its warnings; TensorLy's backend is as before in the end."""
    backend = tensorly.get_backend()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library = importlib.import_module("tltorch")
            tensorly.set_backend("pytorch")  # as the import does, but only when it is the first
            yield library
    finally:
        tensorly.set_backend(backend)


def _pair(case: Case, library: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """One step of each library, checked to compute the same from the same cores."""
    torch.manual_seed(0)
    ours = factorization_class(case.format)(case.shape, case.rank)
    theirs = _same_in_tltorch(ours, library)
    grad = torch.randn(case.shape)
    steps = []
    for reconstruct, parameters in ((ours.reconstruct, ours.parameters()), (theirs.to_tensor, theirs.parameters())):
        steps.append(step_of(reconstruct, list(parameters), grad))
    torch.testing.assert_close(theirs.to_tensor(), ours.reconstruct(), rtol=1e-3, atol=1e-4)
    return steps[0], steps[1]


def _same_in_tltorch(ours: Factorization, library: Any) -> Any:
    cores = [nn.Parameter(core.detach().clone()) for core in ours.cores]
    match ours.name:
        case "cp":
            return library.CPTensor(nn.Parameter(torch.ones(ours.rank[0])), cores)
        case "tucker":
            return library.TuckerTensor(cores[0], cores[1:])
        case "tt":
            return library.TTTensor(cores)
        case _:
            raise ValueError(f"expected 'cp', 'tucker' or 'tt' in `format`, got {ours.name!r}")


def step_of(reconstruct: Callable[[], Tensor], parameters: Sequence[Tensor], grad: Tensor) -> Callable[[], None]:
    """Forward and backward through a reconstruction."""

    def step() -> None:
        torch.autograd.grad(reconstruct(), parameters, grad)

    return step


def calls_within(seconds: float, step: Callable[[], None]) -> int:
    """About how many steps take so many seconds."""
    step()
    begin = time.perf_counter()
    calls = 0
    while time.perf_counter() - begin < seconds:
        step()
        calls += 1
    return max(calls, 1)
