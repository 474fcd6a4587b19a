"""A step on a large tensor with few known entries, as the modes grow and the entries do not."""

import functools
import time
from collections.abc import Sequence

from benchmarks.loops import FitLoop, Loop, TakeTurns, interleave, quiet
from benchmarks.memory import Memory, memory_of
from benchmarks.problems import METHODS, PROBLEMS, Problem, train
from benchmarks.report import Ratio, Report, Table, spread
from tenzoo.data import CompletionDataModule

_MAX_GB = 4.0


def sparse(
    rounds: int, *, problems: Sequence[Problem] = PROBLEMS, warmup: int = 4, fresh_processes: bool = True
) -> Report:
    """Train CP of rank 8 on tensors of growing modes, with row-sparse gradients and, for contrast, with dense ones.

    Args:
        rounds: How often each variant has its turn, of one pass over the entries.
        problems: From the smallest to the largest.
        warmup: Steps before the first turn.
        fresh_processes: Also measure memory, in a process for each variant.
    """
    loops: dict[str, Loop] = {}
    setup: list[list[str]] = []
    ready: dict[Problem, CompletionDataModule] = {}
    for problem in problems:
        begin = time.perf_counter()
        ready[problem] = problem.data(warmup + rounds * problem.steps)
        ready[problem].setup()
        setup.append([problem.name, f"{time.perf_counter() - begin:.1f}"])
    for method in METHODS:  # what is compared most stands side by side: the same method at all sizes
        for problem, data in ready.items():
            fit = functools.partial(train, problem, method, data, TakeTurns(warmup, problem.steps))
            loops[f"{method}, {problem.name}"] = FitLoop(fit)
    with quiet():
        times = interleave(loops, rounds)
    tables: list[Table] = [(("generation, sorting and checks, one run", "s"), setup), _share_of_das(times, problems)]
    if fresh_processes:
        found = {(problem, method): memory_of(problem, method) for problem in problems for method in METHODS}
        tables.append(_memory_table(found, limited=problems[1]))
    title = f"sparse: CP rank 8, {problems[0].num_entries:,} entries, batches of {problems[0].batch_size:,}"
    note = "Turns of one pass over the entries, under Lightning without loggers, drawing the batches included."
    return Report(title, note, ("ms/step", 1e3), times, _ratios(times, problems), tables)


def _ratios(times: dict[str, list[float]], problems: Sequence[Problem]) -> list[Ratio]:
    small, *larger = (problem.name for problem in problems)
    ratios = []
    for method in ("SGD", "SparseAdam", "dense Adam"):
        for position, name in enumerate(larger):
            target = 2.0 if position == 0 and method != "dense Adam" else None
            pair, title = (f"{method}, {name}", f"{method}, {small}"), f"{method}: {name} / {small}"
            ratios.append(Ratio.of(times, *pair, name=title, target=target))
    for above, below in (("dense Adam", "SparseAdam"), ("SGD + DAS", "SGD")):
        for problem in problems:
            pair, title = (f"{above}, {problem.name}", f"{below}, {problem.name}"), f"{problem.name}: {above} / {below}"
            ratios.append(Ratio.of(times, *pair, name=title))
    return ratios


def _share_of_das(times: dict[str, list[float]], problems: Sequence[Problem]) -> Table:
    rows = []
    for problem in problems:
        pairs = zip(times[f"SGD + DAS, {problem.name}"], times[f"SGD, {problem.name}"], strict=True)
        rows.append([problem.name, spread([(both - alone) * 1e3 for both, alone in pairs])])
    return ("what DAS adds to SGD", "ms/step"), rows


def _memory_table(found: dict[tuple[Problem, str], Memory], limited: Problem) -> Table:
    rows = []
    for (problem, method), memory in found.items():
        verdict = ""
        if problem == limited:
            verdict = f"< {_MAX_GB:g} GB: {'met' if memory.peak / 1e9 < _MAX_GB else '**missed**'}"
        numbers = (memory.peak, memory.peak - memory.imports, memory.peak - memory.data)
        rows.append([f"{method}, {problem.name}", *(f"{number / 1e9:.2f}" for number in numbers), verdict])
    header = ("largest RSS of a fresh process, one run", "GB", "minus imports", "minus imports and data", "target")
    return header, rows
