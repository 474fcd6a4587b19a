"""The largest memory of a training process, measured in a fresh one."""

import dataclasses
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.loops import quiet
from benchmarks.problems import Problem, train

_STATUS = Path("/proc/self/status")
_WORKER = "import sys; from benchmarks.memory import work; work(sys.argv[1])"


@dataclass(frozen=True)
class Memory:
    """The largest resident set so far, in bytes, at three moments.

    Args:
        imports: After the imports.
        data: After the data is generated.
        peak: After training.
    """

    imports: int
    data: int
    peak: int


def memory_of(problem: Problem, method: str) -> Memory:
    """Train for one pass in a fresh process."""
    job = json.dumps({"problem": dataclasses.asdict(problem), "method": method})
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, job], cwd=root, stdout=subprocess.PIPE, check=True, encoding="utf-8"
    )
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def work(job: str) -> None:
    """What the fresh process does."""
    torch.set_num_threads(1)
    settings = json.loads(job)
    problem = Problem(**{**settings["problem"], "shape": tuple(settings["problem"]["shape"])})
    with quiet():
        imports = _largest_rss()
        data = problem.data(problem.steps)
        data.setup()
        generated = _largest_rss()
        train(problem, settings["method"], data)
    print(json.dumps({"imports": imports, "data": generated, "peak": _largest_rss()}))


def _largest_rss() -> int:
    # Linux hands ``ru_maxrss`` on from a process to those that it starts: only its own high-water mark begins anew.
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
