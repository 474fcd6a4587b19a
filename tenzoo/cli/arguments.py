"""What the commands that train nothing have in common: their arguments, and errors of one line."""

import argparse
from collections.abc import Sequence


def parser_of(command: str, purpose: str) -> argparse.ArgumentParser:
    """A parser that raises errors."""
    return argparse.ArgumentParser(prog=f"tenzoo {command}", description=purpose, exit_on_error=False)


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str], *, required: Sequence[str] = ()) -> argparse.Namespace:
    """The arguments of a command.

    Args:
        parser: Of :func:`parser_of`.
        argv: As on the command line, without the command.
        required: Names of options that must be there; argparse would exit where one is not.

    Raises:
        ValueError: If one is not there, or another is wrong.
    """
    try:
        chosen = parser.parse_args(list(argv))
    except argparse.ArgumentError as error:
        raise ValueError(f"expected valid arguments for {parser.prog}, got: {error}") from error
    for name in required:
        if getattr(chosen, name) is None:
            raise ValueError(f"expected `--{name}` for {parser.prog}, got none")
    return chosen
