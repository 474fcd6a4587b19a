"""Where and with what a run was made, beside its config."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import torch

from tenzoo import __version__

FILE = "environment.json"


def environment() -> dict[str, Any]:
    """Versions, hardware, the commit of the working directory, and the command line."""
    cuda = torch.cuda.is_available()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "tenzoo": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if cuda else [],
        **_commit(),
    }


def write_environment(path: Path) -> None:
    """Write it to a new file."""
    path.write_text(json.dumps(environment(), indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    """The name of the processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _commit() -> dict[str, Any]:
    """The commit of the repository around the working directory, and whether files in it differ; empty if none."""
    words = {"capture_output": True, "text": True, "timeout": 5, "env": {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}}
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, **words).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], check=True, **words).stdout  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": head, "changed": bool(changed.strip())}
