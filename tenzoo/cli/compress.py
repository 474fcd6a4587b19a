"""``tenzoo compress``: from a dense network's weights to a plan and the weights of a compressed one."""

import copy
import logging
import math
import tempfile
import time
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import get_terminal_size

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from torch import nn

import tenzoo.data
import tenzoo.models  # noqa: F401  (their classes can be named without their modules)
from tenzoo.atomic import atomic_write
from tenzoo.cli.messages import RefusedError, explain
from tenzoo.compression import Plan, apply_, plan, refine_
from tenzoo.compression.calls import Call, said
from tenzoo.compression.progress import LOGGER
from tenzoo.compression.reading import SAMPLES, read_batches
from tenzoo.compression.samples import divider
from tenzoo.factorizations import FactorizationName
from tenzoo.weight_files import load_weights_
from tenzoo.zoo.catalog import with_paths
from tenzoo.zoo.yaml_files import PARSER_MODE, check_configs

PLAN, WEIGHTS = "plan.json", "weights.pt"
"""Names of the files that are written."""

_WIDEST = 140
"""Largest number of columns of the printed plan."""

_SECONDS = 5
"""Seconds between two lines of one phase."""


def compress(
    network: nn.Module,
    weights: str,
    output: str,
    factorization: FactorizationName,
    budget: int | float | None = None,
    ranks: int | float | dict[str, int | float | list[int]] | None = None,
    exclude: list[str] | None = None,
    calibration: LightningDataModule | None = None,
    calibration_size: int | None = None,
    refine: int = 0,
) -> Plan:
    """Compress a trained network, and write plan.json and weights.pt into a folder.

    Args:
        network: The dense network, a class_path with init_args.
        weights: File of its weights: a state dict, a checkpoint of Lightning, or a .safetensors file.
        output: Folder for the plan and the weights, which it must not have yet.
        factorization: cp, tucker, tt, tr or btt.
        budget: A fraction of the whole network's parameters, such as 0.4, or a number of parameters.
        ranks: Instead of a budget: one rank for all layers, or a rank for each by name.
        exclude: Names of layers that stay dense.
        calibration: Data whose training inputs, without labels, show which part of each weight matters.
        calibration_size: Number of inputs that are used, 128 by default.
        refine: Number of passes over these inputs in which the cores are fitted to the outputs of the dense network.
    """
    folder = Path(output)
    if not output or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"expected a folder, existing or new, in `output`, got {output!r}")
    for name in (PLAN, WEIGHTS):
        if (folder / name).exists():
            raise ValueError(f"expected a folder without {name} in `output`, got {output!r}, where there is one")
    if calibration is None and calibration_size is not None:
        raise ValueError(f"expected `calibration` with `calibration_size` {calibration_size}, got none")
    if calibration_size is not None and (isinstance(calibration_size, bool) or calibration_size < 1):
        raise ValueError(f"expected an int >= 1 in `calibration_size`, got {calibration_size}")
    if isinstance(refine, bool) or refine < 0:
        raise ValueError(f"expected an int >= 0 in `refine`, got {refine}")
    if calibration is None and refine:
        raise ValueError(f"expected `calibration` with `refine` {refine}, got none")
    _check_writable(folder)
    LOGGER.info("reading the weights")
    load_weights_(network, weights)
    inputs = None if calibration is None else _inputs(network, calibration, calibration_size or SAMPLES)
    small = plan(
        network, factorization=factorization, budget=budget, ranks=ranks, calibration=inputs, exclude=exclude or []
    )
    dense = copy.deepcopy(network) if refine else network
    apply_(network, small, calibration=inputs)
    if inputs is not None and refine:
        refine_(network, dense, calibration=inputs, epochs=refine)
    LOGGER.info("writing the files")
    _write(folder, small, network)
    return small


def compress_command(argv: Sequence[str]) -> int:
    """Compress the network of a config, and print the plan and how to train the network further."""
    argv = with_paths(argv)
    check_configs(argv)
    parser = ArgumentParser(prog="tenzoo compress", exit_on_error=False, allow_abbrev=False, parser_mode=PARSER_MODE)
    parser.add_argument("--config", action="config", help="YAML file of the arguments below; several are composed")
    parser.add_function_arguments(compress, sub_configs=True)
    for action in parser._actions:
        if action.dest == "network":
            action.extra_help = lambda: ""  # type: ignore[attr-defined]  # it would name hundreds of classes
    try:
        arguments = parser.instantiate(parser.parse_args(list(argv))).as_dict()
    except ArgumentError as error:
        raise RefusedError(explain(error, parser)) from error
    arguments.pop("config")
    with printed_progress():
        small = compress(**arguments)
    print(small.table(min(_WIDEST, get_terminal_size((_WIDEST, 24)).columns)))
    folder = arguments["output"]
    print(
        f"Written: {folder}/{PLAN} and {folder}/{WEIGHTS}. Train it further as the network "
        f"tenzoo.models.CompressedNetwork of these two files, as configs/resnet20_compressed.yaml does."
    )
    return 0


def _inputs(network: nn.Module, data: LightningDataModule, size: int) -> list[Call]:
    """The first training inputs."""
    LOGGER.info("reading calibration data")
    data.prepare_data()
    data.setup("fit")
    batches = (data.on_after_batch_transfer(batch, number) for number, batch in enumerate(data.train_dataloader()))
    return read_batches(batches, "calibration", network, divider(network), samples=size)


# --- files ---------------------------------------------------------------------------------------------------------


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before minutes of work; the folder stays as it is."""
    with _existing(folder) as created, tempfile.TemporaryFile(dir=folder):
        pass
    _remove(created)


def _write(folder: Path, small: Plan, network: nn.Module) -> None:
    with _existing(folder), atomic_write(folder / WEIGHTS) as file:
        try:
            torch.save(network.state_dict(), file)
        except RuntimeError as error:  # torch's for a full disk
            raise OSError(f"writing fails: {said(error)}") from error
        small.save(folder / PLAN)


@contextmanager
def _existing(folder: Path) -> Iterator[list[Path]]:
    """Make a folder, and remove it if writing into it fails."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield created
    except OSError as error:
        _remove(created)
        raise OSError(
            f"expected a folder that can be written to in `output`, got {str(folder)!r}: {error.strerror or error}"
        ) from error


def _remove(created: Sequence[Path]) -> None:
    for path in created:
        with suppress(OSError):
            path.rmdir()


# --- progress ------------------------------------------------------------------------------------------------------


class _PrintedLines(logging.Handler):
    """Prints phases, and a layer of a phase every few seconds; no line is wider than the terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._last = -math.inf

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line at once, also where the output is not a terminal."""
        now = time.monotonic()
        if record.levelno >= logging.INFO or now - self._last > _SECONDS:
            self._last = now
            print(record.getMessage()[: get_terminal_size((80, 24)).columns], flush=True)


@contextmanager
def printed_progress() -> Iterator[None]:
    """Print the progress in this context."""
    lines, level = _PrintedLines(), LOGGER.level
    LOGGER.addHandler(lines)
    LOGGER.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(lines)
