"""From configs to the objects that they name."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

import tenzoo.data  # noqa: F401  (its classes can be named without their module)
from tenzoo.tasks import Task
from tenzoo.zoo.composition import settle
from tenzoo.zoo.yaml_files import PARSER_MODE, check_configs


class ConfigCLI(LightningCLI):
    """Reads configs that compose: what one says of another optimizer or data set is settled."""

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        if isinstance(args, list):
            name = self.config.get("subcommand")
            settle(self.config[name] if name else self.config, args, name)


class _ModelOnly(ConfigCLI):
    """Makes the task and the data module alone."""

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


_SAYS_NOTHING = (
    "Tip:",
    "TPU available: False",
    "IPU available: False",
    "HPU available: False",
    "Trainer already configured with model",
)


def _says_something(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _SAYS_NOTHING)


def quiet() -> None:
    """Keep out what nobody who runs a config can act on."""
    lightnings_own = (
        ".*LeafSpec.*is deprecated",
        "(?s).*JsonargparseDeprecationWarning",
        "(?s).*was deprecated in v4",
        "(?s).*Unable to serialize instance cpu",  # a default of its weight averaging
    )
    expected = (
        "Experiment logs directory .* exists",  # it is TensorBoard's of this very run: a version is always a new one
        "The dirpath has changed",
        "Couldn't infer the batch indices",
        ".*does not have many workers",
        "LightningCLI's args parameter",
    )
    for message in (*lightnings_own, *expected):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_says_something)


def build(cli: LightningCLI, argv: Sequence[str], *, run: bool, parser: dict[str, Any], **kwargs: Any) -> None:
    """Initialize a command line, and run its command.

    Args:
        cli: Made by ``__new__`` only: its parsers are wanted also where this fails.
        argv: As on the command line, without the program's name.
        run: Whether ``argv`` begins with a subcommand.
        parser: Arguments of the parser.
        **kwargs: Arguments of the command line.
    """
    check_configs(argv)
    subcommands = cli.subcommands()
    if run and argv and argv[0] in subcommands:  # a parser of the others takes a third of the start, and is not used
        cli.subcommands = lambda: {argv[0]: subcommands[argv[0]]}  # type: ignore[method-assign]
    strict = {"exit_on_error": False, "allow_abbrev": False, "parser_mode": PARSER_MODE}
    cli.__init__(  # type: ignore[misc]
        Task,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        parser_kwargs={**strict, **parser, **{name: dict(strict) for name in cli.subcommands()}},
        args=list(argv),
        run=run,
        **kwargs,
    )


def read(argv: Sequence[str]) -> tuple[Task, LightningDataModule]:
    """The task and the data module of the options of ``tenzoo fit``; nothing is said, and no seed is set.

    Args:
        argv: Such as ``["--config", "covid_tucker.yaml"]``.
    """
    cli = _ModelOnly.__new__(_ModelOnly)
    with _said_by_lightning(logging.WARNING), warnings.catch_warnings():
        quiet()
        build(
            cli, [*argv, "--seed_everything", "false"], run=False, parser={"prog": "tenzoo"}, seed_everything_default=0
        )
    return cli.model, cli.datamodule


@contextmanager
def _said_by_lightning(level: int) -> Iterator[None]:
    """Nothing below a level."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(level)
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
