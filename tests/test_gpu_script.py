"""The checks for a GPU, run on the CPU: whether they are right, not what they measure."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tenzoo
from benchmarks.__main__ import main
from benchmarks.gpu import fits, speed, training
from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.run import Finding, Place, place_of, run
from tenzoo.factorizations import FACTORIZATIONS

CPU = Place(torch.device("cpu"))
ORDER = [
    "formats",
    "methods",
    "sam at 0",
    "no waiting",
    "steps",
    "completion",
    "compression",
    "ddp",
    "evaluation",
    "resume",
    "rates",
]


def finding(name, ok=True):
    return lambda place: iter([Finding(name, "1.0", "< 2", ok)])


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_each_finding_is_one_line_with_what_was_expected(capsys):
    checks = {"a": finding("first"), "b": finding("second", False), "c": finding("third", None)}
    assert run(CPU, checks) == 1
    header, first, second, third, end = lines(capsys)
    assert header.startswith("no card: dry run on CPU, nothing measured (torch ")
    assert first.startswith("ok ")
    assert first.endswith("first: 1.0  [< 2]")
    assert second.startswith("MISSED ")
    assert third.startswith("- ")
    assert end.startswith("1 wrong, ")


def test_a_check_that_fails_is_one_line_and_the_others_go_on(capsys):
    def broken(place):
        yield Finding("before", "1", "")
        raise RuntimeError("no\n such  card")

    assert run(CPU, {"broken": broken, "sound": finding("after")}) == 1
    _, before, failed, after, _ = lines(capsys)
    assert "before" in before
    assert failed.startswith("MISSED")
    assert "broken: RuntimeError: no such card" in failed
    assert after.startswith("ok")


def test_nothing_begins_after_the_time_is_up_and_what_is_left_out_is_said(capsys):
    now = iter(range(0, 10_000, 10))

    def long(place):
        yield from (Finding(f"part {number}", "1", "", True) for number in range(100))

    assert (
        run(
            CPU,
            {"a": finding("a"), "long": long, "c": finding("c"), "d": finding("d")},
            seconds=75,
            clock=lambda: next(now),
        )
        == 0
    )
    *_, rest, others, end = lines(capsys)
    assert rest == "LEFT OUT after 75 s: the rest of long"
    assert others == "LEFT OUT after 75 s: c, d"
    assert end.startswith("nothing wrong")


def test_a_check_that_hangs_is_given_up(capsys, monkeypatch):
    def hangs(place):
        while True:
            torch.zeros(1).add_(1)
        yield

    monkeypatch.setattr("benchmarks.gpu.run._LONGEST", 0.05)
    assert run(CPU, {"hangs": hangs, "sound": finding("after")}) == 1
    _, given_up, after, _ = lines(capsys)
    assert "hangs: TimeoutError: not done after 0 s" in given_up
    assert after.startswith("ok")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_is_a_dry_run():
    assert place_of(None) == place_of("cpu") == CPU
    for device in ("cuda", "meta"):
        with pytest.raises(ValueError, match=f"in `--device`, got '{device}'"):
            place_of(device)


def test_the_most_important_comes_first():
    assert list(CHECKS) == ORDER


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["covid", "--device=cpu"], "gpu alone beside --device"),
        (["gpu", "--device=tpu"], "device"),
        (["gpu", "covid"], "got"),
    ],
)
def test_arguments_that_are_refused(args, message, capsys):
    with pytest.raises(SystemExit) as exit_of:
        main(args)
    assert exit_of.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [0, 3])
def test_the_exit_code_says_whether_something_is_wrong(wrong, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.run.main", lambda device: wrong)
    with pytest.raises(SystemExit) as exit_of:
        main(["gpu", "--device=cpu"])
    assert exit_of.value.code == min(wrong, 1)


def found_by(name):
    findings = list(CHECKS[name](CPU))
    assert findings
    assert [finding for finding in findings if finding.ok is False] == []
    return findings


def test_formats_and_rates():
    findings = found_by("formats")
    assert len(findings) == 10
    assert all(finding.ok for finding in findings)
    assert f"conv, {2 * len(FACTORIZATIONS)} cases, TF32 on" in findings[5].name
    assert [finding.figure for finding in found_by("rates")] == ["not measured"] * 5


def test_wrong_numbers_are_missed(monkeypatch):
    """A check that compares nothing would be met as well."""
    from tenzoo.layers import TensorizedConv2d

    forward = TensorizedConv2d.forward
    monkeypatch.setattr(
        TensorizedConv2d, "forward", lambda layer, x: forward(layer, x) * (1 if x.dtype == torch.float64 else 1.0001)
    )
    findings = list(CHECKS["formats"](CPU))
    assert [finding.ok for finding in findings] == [False, *[True] * 9]


def test_a_wrong_sam_is_missed(monkeypatch):
    monkeypatch.setattr(training, "SAM", lambda rho: fits.SAM(1e-3))
    finding = next(training.sam_at_zero(CPU))
    assert not finding.ok
    assert int(finding.figure.split()[0]) > 100


def test_what_waits_is_named(monkeypatch):
    """As on a card, where torch raises the error that the loss raises here."""
    modes = []
    monkeypatch.setattr(Place, "real", True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(fits, "trainer_of", _on_cpu(fits.trainer_of))

    class Waiting(fits.ImageClassificationTask):
        def loss(self, batch, batch_idx):
            if modes and modes[-1] == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            return super().loss(batch, batch_idx)

    task = Waiting(fits.network(), optimizer=fits.sgd)
    data = fits.RandomImages(88, 8, batch_size=4)
    finding = training._waits(CPU, "network", task, data, 21, [], "32-true")
    assert modes == ["error", "default"]
    assert not finding.ok
    assert "tenzoo/tasks/base.py" in finding.figure


def _on_cpu(trainer_of):
    return lambda *args, **kwargs: trainer_of(*args, **{**kwargs, "accelerator": "cpu"})


def test_an_epoch_is_longer_than_what_is_watched():
    """Else the watch would never be told to end."""
    for place in (CPU, Place(torch.device("cuda"))):
        data = training._images(place)
        assert data._count // data.batch_size >= 2 * training._LOGGED - 1


def test_kernels_are_counted_without_copies():
    class Profile:
        def events(self):
            kind = torch.autograd.DeviceType
            names = [("gemm", kind.CUDA), ("Memcpy HtoD", kind.CUDA), ("Memset", kind.CUDA), ("aten::mm", kind.CPU)]
            return [type("Event", (), {"name": name, "device_type": device})() for name, device in names]

    assert speed._kernels(Profile()) == 1


@pytest.mark.slow
def test_training_needs_no_compiled_packages():
    """On a machine with a card there may be torch, lightning and packages in pure Python only."""
    script = (
        "import sys\n"
        "for name in ('safetensors', 'onnx', 'onnxruntime', 'tltorch'): sys.modules[name] = None\n"
        "import benchmarks.__main__, benchmarks.gpu.checks"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1], timeout=240)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["matplotlib", "tensorboard", "torchvision", "safetensors", "onnx", "triton"])
def test_no_module_of_the_package_imports_it_when_it_is_imported(name):
    for path in Path(tenzoo.__file__).parent.rglob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                imported = [alias.name for alias in statement.names] + [getattr(statement, "module", None) or ""]
                assert not any(each.split(".")[0] == name for each in imported), path


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ORDER if name not in ("formats", "rates")])
def test_every_check_is_met_on_the_cpu(name):
    threads = torch.get_num_threads()
    found_by(name)
    assert torch.get_num_threads() == threads


class FakeCard(Place):
    """Takes the CPU for a card, at tiny sizes: what is measured means nothing, but all the code runs."""

    real = True

    def pick(self, card, dry):
        return dry


@pytest.fixture
def card(monkeypatch):
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: 2**20)
    monkeypatch.setattr(speed, "profile", lambda activities: profile(activities=[ProfilerActivity.CPU]))
    return FakeCard(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("steps", 24), ("completion", 6), ("evaluation", 4), ("rates", 5)])
def test_on_a_card_everything_is_measured(card, name, count):
    findings = list(CHECKS[name](card))
    assert len(findings) == count
    assert not any("not measured" in finding.figure for finding in findings)
    judged = [finding for finding in findings if "≤" in finding.expected or "<" in finding.expected]
    assert all(finding.ok is not None for finding in judged)
    assert len(judged) == {"steps": 16, "completion": 6, "evaluation": 4, "rates": 0}[name]


@pytest.mark.slow
def test_the_command_runs_in_a_process_of_its_own(capfd):
    """Formats and rates, the first and the last: the script as it is started, without all the rest."""
    script = "import sys; from benchmarks.gpu import run; sys.exit(run.main('cpu', ['formats', 'rates']))"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1], timeout=240)
    out = capfd.readouterr().out.splitlines()
    assert len(out) == 1 + 10 + 5 + 1
    assert out[-1].startswith("nothing wrong")
