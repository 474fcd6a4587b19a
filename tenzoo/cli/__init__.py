"""The command line: ``python -m tenzoo fit|validate|test|predict``."""

from tenzoo.cli.app import main, run

__all__ = ["main", "run"]
