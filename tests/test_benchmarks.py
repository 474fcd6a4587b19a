import math
import re

import pytest
import tensorly
import torch

from benchmarks.__main__ import COMPARISONS, main
from benchmarks.covid import covid
from benchmarks.loops import BareLoop, FitLoop, interleave
from benchmarks.memory import memory_of
from benchmarks.problems import METHODS, Problem
from benchmarks.rebuild import Case, tltorch
from benchmarks.report import Ratio, Report
from benchmarks.sparse import sparse

TINY = [Problem((20 * scale, 10 * scale, 4), num_entries=100, batch_size=64) for scale in (1, 2, 3)]


def assert_complete(report, variants, rounds=2):
    assert len(report.times) == variants
    assert all(len(row) == rounds and min(row) > 0 for row in report.times.values())
    assert report.ratios
    assert all(math.isfinite(ratio.median) and len(ratio.values) == rounds for ratio in report.ratios)
    text = report.markdown()
    assert all(name in text for name in [*report.times, *(ratio.name for ratio in report.ratios)])


def test_covid(capsys):
    report = covid(2, steps=3, warmup=2)
    assert_complete(report, variants=7)
    assert [ratio.target for ratio in report.ratios[:3]] == [1.6, 1.05, 2.1]
    assert capsys.readouterr() == ("", "")


def test_sparse(capsys):
    report = sparse(2, problems=TINY, warmup=1, fresh_processes=False)
    assert_complete(report, variants=len(METHODS) * len(TINY))
    assert [ratio.target for ratio in report.ratios if ratio.target is not None] == [2.0, 2.0]
    assert capsys.readouterr() == ("", "")


def test_memory_of_a_fresh_process():
    memory = memory_of(TINY[0], "SparseAdam")
    assert 0 < memory.imports <= memory.data <= memory.peak


def test_tltorch():
    pytest.importorskip("opt_einsum")
    backend = tensorly.get_backend()
    cases = [Case((5, 4, 3), "tucker", (2, 2, 2)), Case((5, 4, 3), "cp", (2,)), Case((5, 4, 3), "tt", (2, 2))]
    assert_complete(tltorch(2, cases=cases, seconds=0.0), variants=6)
    assert tensorly.get_backend() == backend


def test_loops_take_turns():
    order = []
    names = ("a", "b")
    loops = {name: BareLoop(lambda name=name: order.append(name), steps=2, warmup=1) for name in names}
    times = interleave(loops, 2)
    assert order == ["a", "b", *"aabbaabb"]
    assert {name: len(row) for name, row in times.items()} == {"a": 2, "b": 2}


def test_an_error_in_a_fit_is_raised_by_whoever_waits_for_it():
    def fit():
        raise RuntimeError("no such model")

    with pytest.raises(RuntimeError, match="no such model"):
        FitLoop(fit).start()


def test_a_missed_target_is_named():
    times = {"slow": [3.0, 2.0, 2.5], "fast": [1.0, 1.0, 1.0]}
    met, missed = Ratio.of(times, "slow", "fast", target=3), Ratio.of(times, "slow", "fast", target=2)
    assert (met.verdict, missed.verdict) == ("≤ 3: met", "≤ 2: **missed**")
    text = Report("title", "note", ("ms", 1e3), times, [met, missed]).markdown()
    assert "| slow | 2,500 (2,000–3,000) |" in text
    assert "| slow / fast | 2.50 (2.00–3.00) | ≤ 2: **missed** |" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [(["cp"], r"expected names of \['covid', 'sparse', 'tltorch'\], got \['cp'\]"), (["--repeats=3"], "at least 7")],
)
def test_arguments_that_are_refused(args, message, capsys):
    with pytest.raises(SystemExit):
        main(args)
    assert re.search(message, capsys.readouterr().err)


def test_the_command_prints_the_comparisons_that_are_named(monkeypatch, capsys):
    threads = torch.get_num_threads()
    report = Report("title", "note", ("ms", 1e3), {"a": [1.0]}, [])
    for name in COMPARISONS:
        monkeypatch.setitem(COMPARISONS, name, lambda rounds, name=name: report if name == "covid" else None)
    try:
        main(["covid", "--repeats=8"])
    finally:
        torch.set_num_threads(threads)
    assert "### title" in capsys.readouterr().out
