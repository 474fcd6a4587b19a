"""The command line."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from tenzoo import __version__
from tenzoo.cli.completion import completion_command
from tenzoo.cli.help import text

__all__ = ["main", "run"]


def main(args: Sequence[str] | None = None) -> int:
    """Run a command in this process; help and completion need no package that training needs.

    Args:
        args: As on the command line, without the program's name; None takes ``sys.argv``.

    Returns:
        As :func:`tenzoo.cli.app.execute`.
    """
    argv = list(sys.argv[1:] if args is None else args)
    if argv in (["-h"], ["--help"], ["help"]):
        print(text())
        return 0
    if argv == ["--version"]:
        print(f"tenzoo {__version__}")
        return 0
    if argv[:1] == ["completion"]:
        with suppress(ValueError):  # said below, as of any command
            return completion_command(argv[1:])
    from tenzoo.cli.app import execute

    return execute(argv)


def run() -> None:
    """The console script. Like ``python -m`` it finds modules of one's own in the working directory."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # a reader such as head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if "torch" in sys.modules:
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # later its threads may abort a process that is done
    raise SystemExit(code)
