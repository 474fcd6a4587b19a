"""``tenzoo list``, ``describe``, ``compress`` and ``generate``: commands that train nothing."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from typing_extensions import override

from tenzoo.cli.causes import chain
from tenzoo.cli.compress import compress_command
from tenzoo.cli.generate import generate_command
from tenzoo.cli.messages import Answer, answer
from tenzoo.cli.trainer import TenzooCLI, build
from tenzoo.cli.zoo import Entry, describe, print_entries, print_layers, read_results, totals
from tenzoo.models import CompressedNetwork
from tenzoo.models.compressed_network import NotCompressedYetError
from tenzoo.models.pretrained_transformer import NoPretrainedModelError, NoTextPackagesError

PARTS = ("adapters", "few_shot", "methods", "schedules", "compress")
"""Folders of configs that are composed over others."""


class _ModelOnly(TenzooCLI):
    """Reads a config as ``fit`` does, and makes the task and the data module alone."""

    @override
    def _parse_ckpt_path(self) -> None:
        pass

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def _parser(command: str, purpose: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"tenzoo {command}", description=purpose, exit_on_error=False)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    return parser


def describe_command(argv: Sequence[str]) -> int:
    """Print the layers of the model of a config."""
    parser = _parser("describe", "Show the layers of a model; --config and overrides are those of tenzoo fit.")
    chosen, rest = parser.parse_known_args(list(argv))
    cli = _read(rest)
    inputs = cli.model.example_input(cli.datamodule)
    network = cli.model.described_network(cli.datamodule)
    layers = describe(network, inputs)
    if any(layer.multiplications is None for layer in layers):
        task, data = type(cli.model).__name__, type(cli.datamodule).__name__
        print(f"tenzoo: multiplications are not counted: {task}.example_input() gives none for {data}", file=sys.stderr)
    print_layers(layers, None if inputs is None else len(inputs), as_json=chosen.json)
    parameters = list(network.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if trained < (number := sum(parameter.numel() for parameter in parameters)) and not chosen.json:
        print(f"trained: {trained:,} of {number:,} parameters; the others are frozen")
    return 0


def list_command(argv: Sequence[str]) -> int:
    """Print the entries of the zoo, and on stderr what cannot be read, which makes the exit code that of an error."""
    parser = _parser("list", "Show the configs of a folder: model, size, published and measured results.")
    parser.add_argument("--configs", type=Path, default=Path("configs"), metavar="DIR", help="default: %(default)s")
    chosen, rest = parser.parse_known_args(list(argv))
    if rest:
        raise ValueError(f"expected only --configs and --json for tenzoo list, got {' '.join(rest)}")
    if not chosen.configs.is_dir():
        raise ValueError(f"expected a folder of configs in `--configs`, got {str(chosen.configs)!r}")
    results = read_results(chosen.configs)
    paths = sorted(path for path in chosen.configs.rglob("*.yaml") if path.parent.name not in PARTS)
    entries: list[Entry] = []
    refused: list[Answer] = []
    for path in paths:
        try:
            with _offline():
                entries.append(_entry(path, {"published": None, "measured": None, **results.get(path.stem, {})}))
        except Exception as error:  # the other entries are shown
            said = answer(error)
            if said is None:
                raise
            named = said.line if str(path) in said.line else f"{said.line} (in {str(path)!r})"
            refused.append(Answer(named, said.code))
    print_entries(entries, as_json=chosen.json)
    for said in refused:
        print(said.line, file=sys.stderr)
    return max((said.code for said in refused), default=0)


def _read(argv: Sequence[str]) -> _ModelOnly:
    cli = _ModelOnly.__new__(_ModelOnly)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        build(cli, [*argv, "--seed_everything", "false"], run=False)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return cli


@contextmanager
def _offline() -> Iterator[None]:
    """Without the hub: a list fetches no models."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def _entry(path: Path, results: dict[str, str | None]) -> Entry:
    try:
        cli = _read(["--config", str(path)])
    except Exception as error:
        for cause in chain(error):
            for kind, instead in _NOT_THERE.items():
                if isinstance(cause, kind):
                    return Entry(str(path), instead, "", None, None, **results)
        raise
    network = cli.model.described_network(cli.datamodule)
    layers = describe(network)
    formats = sorted({layer.factorization for layer in layers if layer.factorization is not None})
    if isinstance(network, CompressedNetwork):
        network = network.network
    name = f"{type(network).__name__}-{getattr(network, 'depth', '')}".rstrip("-")
    data = cli.datamodule.hparams.get("dataset") or type(cli.datamodule).__name__.removesuffix("DataModule")
    number, dense = totals(layers)
    model = " ".join([*formats, name])
    return Entry(str(path), model, data, number, dense / number, **results)


_NOT_THERE: dict[type[Exception], str] = {
    NotCompressedYetError: "(made by tenzoo compress)",
    NoPretrainedModelError: "(weights not there)",
    NoTextPackagesError: "(needs pip install tenzoo[text])",
}
"""What is shown for models that cannot be made yet."""

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "list": list_command,
    "describe": describe_command,
    "compress": compress_command,
    "generate": generate_command,
}
