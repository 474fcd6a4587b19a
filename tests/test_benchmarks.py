import math
import re
import sys

import pytest
import tensorly
import torch
from torch import nn

from benchmarks.__main__ import COMPARISONS, main
from benchmarks.adapters import SETTINGS, adapters
from benchmarks.compression import compression
from benchmarks.covid import covid
from benchmarks.decoders import decoders
from benchmarks.estimates import Case as LayerCase
from benchmarks.estimates import loss_of_pick, rank_correlation
from benchmarks.finetuning import finetuning
from benchmarks.layers import layers
from benchmarks.loops import BareLoop, FitLoop, interleave
from benchmarks.memory import memory_of
from benchmarks.networks import networks
from benchmarks.problems import METHODS, Problem
from benchmarks.reconstruct import Case, tltorch
from benchmarks.report import Ratio, Report
from benchmarks.rivals import note_on, rival_networks, tltorch_if_installed, try_rival
from benchmarks.sparse import sparse
from benchmarks.steps import layer_step, on_threads, saved_bytes

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


@pytest.mark.slow
def test_decoders(capsys):
    report = decoders(2, widths={16: 0.5, 32: 0.5}, batch=2, context=8, depth=1, length=6, threads=1)
    assert_complete(report, variants=15)
    targets = [ratio.target for ratio in report.ratios]
    assert targets == [1.1, 1.1, 0.9, 0.9, *[1 / 0.95] * 4, 1.02, 2.05]
    assert [row[0] for row in report.tables[0][1]] == [
        f"{name} {w}" for w in (16, 32) for name in ("dense", "TT", "BTT")
    ]
    assert capsys.readouterr() == ("", "")


def test_sparse(capsys):
    report = sparse(2, problems=TINY, warmup=1, fresh_processes=False)
    assert_complete(report, variants=len(METHODS) * len(TINY))
    assert [ratio.target for ratio in report.ratios if ratio.target is not None] == [2.0, 2.0]
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters():
    pytest.importorskip("peft", reason="needs the extra text: pip install tenzoo[text]")
    report = adapters(2, batch=2, length=8, layers=1, width=48, r=4)
    assert_complete(report, variants=len(SETTINGS) + 4)
    assert [ratio.target for ratio in report.ratios] == [1.05, 1.05, 1.2, 1.25, None, 1.02, 2.05]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_finetuning():
    pytest.importorskip("peft", reason="needs the extra text: pip install tenzoo[text]")
    report = finetuning(2, batch=2, length=4, layers=1)
    assert_complete(report, variants=3)
    assert [ratio.target for ratio in report.ratios] == [1.1, 2.1]


def test_compression():
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10))
    cases = [LayerCase((8, 8), 6, 2, name, 2) for name in ("tt", "cp")]
    report = compression(2, network=network, budget=3_000, side=8, batches=(1, 3), cases=cases)
    assert_complete(report, variants=6)
    assert [ratio.target for ratio in report.ratios] == [1.0, None, 1.0, None]
    assert "in inference" in report.markdown()


@pytest.mark.slow
def test_memory_of_a_fresh_process():
    memory = memory_of(TINY[0], "SparseAdam")
    assert 0 < memory.imports <= memory.data <= memory.peak


def test_tltorch():
    pytest.importorskip("opt_einsum")
    backend = tensorly.get_backend()
    cases = [Case((5, 4, 3), "tucker", (2, 2, 2)), Case((5, 4, 3), "cp", (2,)), Case((5, 4, 3), "tt", (2, 2))]
    assert_complete(tltorch(2, cases=cases, seconds=0.0), variants=6)
    assert tensorly.get_backend() == backend


def rows_of(report, start):
    """The rows of the table whose header starts so."""
    return next([row[0] for row in rows] for header, rows in report.tables if header[0].startswith(start))


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
def test_networks(monkeypatch, capsys, installed):
    if not installed:
        for library in ("tednet", "tltorch"):  # as an import of what is missing
            monkeypatch.setitem(sys.modules, library, None)
        for name in [name for name in sys.modules if name.startswith("tednet.")]:
            monkeypatch.delitem(sys.modules, name)
    threads, backend = torch.get_num_threads(), tensorly.get_backend()
    names = ["dense", "TR 10", "TT 16"]
    report = networks(2, images=2, rival_images=2, side=4, names=names, steps=1, threads=1)
    assert_complete(report, variants=2 * len(names) + 2 + 3)
    assert sorted(ratio.target for ratio in report.ratios if ratio.target) == [1.01, 1.02, 1.1, 1.15, 1.15, 2.05]
    assert rows_of(report, "saved") == names
    ours = [f"tenzoo {name}" for name in names]
    rivals = rows_of(report, "batch of 2, median of 2 rounds")
    theirs = list(rival_networks(20))
    assert rivals[: len(ours)] == ours
    assert all((name in rivals) != (name in report.note) for name in theirs)
    if not installed:
        assert rivals == ours
        assert "TedNet TR 10 (ModuleNotFoundError: " in report.note
    assert (torch.get_num_threads(), tensorly.get_backend()) == (threads, backend)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_layers(capsys):
    cases = [LayerCase((4, 4), 4, 2, "tt", 2), LayerCase((8, 8), 0, 4, "cp", 2), LayerCase((8, 8), 0, 4, "btt", 0.5)]
    tiny = {
        "channels": 8,
        "side": 3,
        "batch": 2,
        "features": 27,
        "table": (60, 24),
        "indices": 5,
        "cases": cases,
        "threads": 1,
    }
    report = layers(2, **tiny)
    ours = [name for name in report.times if not name.startswith("tltorch")]
    theirs = {"conv CP", "conv Tucker", "linear BlockTT", "linear Tucker", "embedding BlockTT"}
    assert len(ours) == 3 + 5 * 3 + 1
    assert all(any(f"tltorch {kind}" in text for text in [*report.times, report.note]) for kind in theirs)
    assert_complete(report, variants=len(report.times))
    assert sorted(ratio.target for ratio in report.ratios if ratio.target) == [*[0.7] * 5, 1.0, *[1.1] * 5]
    assert rows_of(report, "parameters")[:2] == ["embedding dense", "embedding TT"]
    assert sorted(rows_of(report, "reconstruct / contract")) == sorted(case.name for case in cases)
    assert capsys.readouterr() == ("", "")


def test_estimates_are_judged():
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [0.1, 7.0, 90.0, 91.0]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 1.0, 2.0]) == pytest.approx(-0.8)
    assert [loss_of_pick(*pair) for pair in ((2.0, 4.0), (2.0, 0.5), (0.5, 0.5), (0.5, 4.0))] == [1, 2, 1, 4]


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 10))
    images, labels = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    # What ReLU gives is kept by itself and by the second layer; cross-entropy keeps log-probabilities and their sum.
    assert saved_bytes(network, (images, labels)) == 4 * (4 * 5 + 4 * 10 + 1)
    assert saved_bytes(network.double(), (images.double(), labels)) == 8 * (4 * 5 + 4 * 10 + 1)


def test_a_step_of_a_layer_starts_without_gradients():
    layer, x = nn.Linear(3, 2, bias=False), torch.randn(4, 3)
    step = layer_step(layer, x)
    step()
    grad = layer.weight.grad.clone()
    step()
    torch.testing.assert_close(layer.weight.grad, grad)
    assert not x.requires_grad


def test_a_rival_that_fails_is_skipped_with_its_reason():
    def fail():
        raise ValueError("no\n such  rank")

    steps, skipped = {}, []
    try_rival(steps, skipped, "broken", lambda: fail)
    try_rival(steps, skipped, "missing", fail)
    try_rival(steps, skipped, "sound", lambda: print)
    assert list(steps) == ["sound"]
    assert note_on(skipped) == " Skipped: broken (ValueError: no such rank); missing (ValueError: no such rank)."
    assert note_on([]) == ""


def test_rivals_have_the_size_of_ours():
    pytest.importorskip("opt_einsum")
    x = torch.randn(1, 3, 8, 8)
    with tltorch_if_installed():
        for name, make in rival_networks(20).items():
            if name.startswith("tltorch"):
                network = make()
                assert not any(isinstance(module, nn.Conv2d) for module in network.modules())
                assert 40_000 < sum(parameter.numel() for parameter in network.parameters()) < 80_000
                assert network(x).shape == (1, 10)


def test_threads_are_given_back():
    threads = torch.get_num_threads()
    with on_threads(threads + 1):
        assert torch.get_num_threads() == threads + 1
    assert torch.get_num_threads() == threads


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
    [
        (
            ["cp"],
            r"expected names of \['adapters', 'compression', 'covid', 'decoders', 'finetuning', .*"
            r"'sparse', 'tltorch'\], got \['cp'\]",
        ),
        (["--repeats=3"], "at least 7"),
    ],
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
