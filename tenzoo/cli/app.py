"""The program: one command, run in this process, and errors of one line."""

import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser

from tenzoo.causes import raised_by_own_code
from tenzoo.cli.checks import check_command
from tenzoo.cli.commands import copy_command, describe_command, init_command, list_command, save_command
from tenzoo.cli.completion import completion_command
from tenzoo.cli.compress import compress_command
from tenzoo.cli.generate import generate_command
from tenzoo.cli.messages import answer
from tenzoo.cli.trainer import TenzooCLI, build
from tenzoo.distributed import is_first_process
from tenzoo.jobs import Preempted
from tenzoo.training import DivergenceError
from tenzoo.zoo.catalog import with_paths
from tenzoo.zoo.reading import quiet

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "list": list_command,
    "describe": describe_command,
    "copy": copy_command,
    "init": init_command,
    "compress": compress_command,
    "save": save_command,
    "generate": generate_command,
    "completion": completion_command,
}
"""Those that do not train, by name."""

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def _parser_of(args: Sequence[str], parsers: dict[str, ArgumentParser]) -> ArgumentParser | None:
    return next((parsers[arg] for arg in args if arg in parsers), None)


def execute(argv: list[str]) -> int:
    """Run a command in this process.

    Args:
        argv: As on the command line, without the program's name.

    Returns:
        0; or, after one line on stderr and with nothing trained, 2 if the input was refused, and 1 if a user's own
        code raised an error, which the line names with its file and line; or, after one line, 1 if training diverged,
        or the disk was full or could not be written to, and 128 and its number if a signal stopped it. Other errors
        during training are raised. With ``JSONARGPARSE_DEBUG=true`` in the environment all errors are.
    """
    cli = TenzooCLI.__new__(TenzooCLI)  # its parsers are wanted below also if it fails while being built
    try:
        with warnings.catch_warnings():
            quiet()
            if argv and argv[0] in COMMANDS:
                return COMMANDS[argv[0]](argv[1:])
            check_command(argv, [*COMMANDS, *TenzooCLI.subcommands()])
            build(cli, with_paths(argv))
    except BrokenPipeError:
        raise
    except Preempted as stop:
        return int(stop.code or 0)
    except DivergenceError as error:  # on all ranks, and it says all there is to know
        if is_first_process():
            print(f"tenzoo: error: {error}", file=sys.stderr)
        return 1
    except (Exception, SystemExit) as error:
        began = cli.training_start.began
        if began and isinstance(error, OSError) and error.errno in _DISK and not raised_by_own_code(error):
            where = f": {error.filename}" if error.filename else ""
            print(f"tenzoo: error: {error.strerror}{where}", file=sys.stderr)
            return 1
        found = None if began else answer(error, _parser_of(argv, getattr(cli, "_subcommand_parsers", {})))
        if found is None or os.environ.get("JSONARGPARSE_DEBUG"):
            raise
        cli.log_folders.discard()
        print(found.line, file=sys.stderr)
        return found.code
    finally:
        cli.log_folders.release()
    return 0
