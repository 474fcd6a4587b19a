"""The program: one command, run in this process, and errors of one line."""

import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence

import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from tenzoo.cli.commands import COMMANDS
from tenzoo.cli.messages import explain
from tenzoo.cli.trainer import Started, TenzooCLI, build, quiet

_REFUSALS = (
    ArgumentError,
    ValueError,
    TypeError,
    OSError,
    MisconfigurationException,
    ImportError,
    MemoryError,
    RuntimeError,  # if it is torch's for want of memory
)
_NO_MEMORY = re.compile("out of memory|can't allocate memory|overflow", re.IGNORECASE)


def _parser_of(args: Sequence[str], parsers: dict[str, ArgumentParser]) -> ArgumentParser | None:
    return next((parsers[arg] for arg in args if arg in parsers), None)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command in this process.

    Args:
        args: As on the command line, without the program's name; None takes ``sys.argv``.

    Returns:
        0, or 2 after one line on stderr: the input was refused, and nothing was trained. Errors during training are
        raised. With ``JSONARGPARSE_DEBUG=true`` in the environment all errors are.
    """
    Started.reset()
    argv = list(sys.argv[1:] if args is None else args)
    cli = TenzooCLI.__new__(TenzooCLI)  # its parsers are wanted below also if it fails while being built
    try:
        with warnings.catch_warnings():
            quiet()
            if argv and argv[0] in COMMANDS:
                COMMANDS[argv[0]](argv[1:])
            else:
                build(cli, argv)
    except BrokenPipeError:
        raise
    except _REFUSALS as error:
        unknown = isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error))
        if unknown or Started.begun or os.environ.get("JSONARGPARSE_DEBUG"):
            raise
        Started.discard()
        parser = _parser_of(argv, getattr(cli, "_subcommand_parsers", {}))
        print(f"tenzoo: error: {_in_one_line(error, parser)}", file=sys.stderr)
        return 2
    return 0


def _in_one_line(error: Exception, parser: ArgumentParser | None) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "expected a text file in YAML in `config`, got a binary one"
    if isinstance(error, RuntimeError | TypeError) and _NO_MEMORY.search(str(error)):
        asked = re.search(r"tried to allocate (\S+ \w+)", str(error), re.IGNORECASE)
        amount = f"of {asked[1]} that was refused" if asked else "beyond what can be addressed"
        return f"expected a model and data that fit into memory, got an allocation {amount}; lower `rank` first"
    return explain(str(error), parser)


def run() -> None:
    """The console script."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # a reader such as head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # at the interpreter's end its threads may abort a finished process
    raise SystemExit(code)
