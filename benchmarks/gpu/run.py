"""Checks on one NVIDIA GPU, one line each, the most important first, in less than nine minutes.

Needed are torch 2.9 or newer with CUDA, lightning and packages in pure Python; the data is made here. Without a card,
or with ``--device cpu``, the same code runs at tiny sizes on the CPU: its results have to be right there too, but
nothing is measured.
"""

import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import lightning
import torch

SECONDS = 9 * 60.0
"""Nothing begins later than this after the start."""

_LONGEST = 150.0
"""Seconds after which a check is given up."""


class Finding(NamedTuple):
    """One line."""

    name: str
    figure: str
    expected: str
    """What the figure is to be, in words; empty where it is only of interest."""
    ok: bool | None = None
    """Whether it is; None where nothing is expected, or nothing can be measured."""


@dataclass(frozen=True)
class Place:
    """Where the checks run."""

    device: torch.device

    @property
    def real(self) -> bool:
        """Whether there is a card, so that times mean something."""
        return self.device.type == "cuda"

    def pick(self, card: int, dry: int) -> int:
        """A size: on a card, and in a dry run."""
        return card if self.real else dry

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.real:
            torch.cuda.synchronize(self.device)

    def judged(self, name: str, figure: str, expected: str, ok: bool) -> Finding:
        """A finding about speed or memory: in a dry run nothing is said of it."""
        return Finding(name, figure, expected, ok) if self.real else Finding(name, "not measured", expected)


Check = Callable[[Place], Iterator[Finding]]
"""Gives its findings one after the other, so that each is printed when it is known."""


def place_of(device: str | None) -> Place:
    """The card if there is one, unless another device is asked for.

    Raises:
        ValueError: If it is neither the CPU nor a card that there is.
    """
    there = torch.cuda.is_available()
    if device not in ((None, "cpu", "cuda") if there else (None, "cpu")):
        raise ValueError(f"expected 'cpu', or 'cuda' on a machine with a card, in `--device`, got {device!r}")
    return Place(torch.device(device or ("cuda" if there else "cpu")))


def run(
    place: Place, checks: Mapping[str, Check], *, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic
) -> int:
    """Do the checks in their order and print what they find, each line when it is known.

    A check that raises is one line, and the others go on.

    Args:
        place: Where.
        checks: By name.
        seconds: After this long nothing new begins.
        clock: Tells the seconds.

    Returns:
        How many lines said that something is wrong.
    """
    begin, wrong = clock(), 0
    print(_header(place), flush=True)
    for number, (name, check) in enumerate(checks.items()):
        if clock() - begin > seconds:
            print(f"LEFT OUT after {seconds:.0f} s: {', '.join(list(checks)[number:])}", flush=True)
            break
        since = clock()
        for finding in _findings(name, check, place):
            now = clock()
            wrong += finding.ok is False
            print(_line(finding, now - since), flush=True)
            since = now
            if now - begin > seconds:
                print(f"LEFT OUT after {seconds:.0f} s: the rest of {name}", flush=True)
                break
    print(f"{wrong or 'nothing'} wrong, {clock() - begin:.0f} s", flush=True)
    return wrong


def _findings(name: str, check: Check, place: Place) -> Iterator[Finding]:
    try:
        with _at_most(_LONGEST):
            yield from check(place)
    except Exception as error:  # a fault of one check says nothing about the others
        text = " ".join(str(error).split())
        yield Finding(name, f"{type(error).__name__}: {text[:300]}", "no error", False)
    finally:
        if place.real:
            set_sync_debug_mode("default")
            torch.cuda.empty_cache()


def set_sync_debug_mode(mode: str) -> None:
    """As torch's, without its warning that this is a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError where the body takes longer; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _line(finding: Finding, seconds: float) -> str:
    verdict = {True: "ok", False: "MISSED", None: "-"}[finding.ok]
    expected = f"  [{finding.expected}]" if finding.expected else ""
    return f"{verdict:6} {seconds:6.1f} s  {finding.name}: {finding.figure}{expected}"


def _header(place: Place) -> str:
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"
    if not place.real:
        return f"no card: dry run on CPU, nothing measured ({versions})"
    card = torch.cuda.get_device_properties(place.device)
    memory = f"{card.total_memory / 2**30:.0f} GiB"
    return f"{card.name}, {memory}, CUDA {torch.version.cuda}, {os.cpu_count()} CPU cores ({versions})"


def main(device: str | None = None, names: Sequence[str] | None = None) -> int:
    """Run all checks, or those that are named; the number of lines that said something is wrong."""
    # Read when cuBLAS is first used: results of two runs are to be compared bit for bit.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from benchmarks.gpu.checks import CHECKS  # after the setting

    return run(place_of(device), {name: CHECKS[name] for name in names or CHECKS})
