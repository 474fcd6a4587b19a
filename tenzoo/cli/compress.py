"""``tenzoo compress``: from a dense network's weights to a plan and the weights of a compressed one."""

from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

import tenzoo.data
import tenzoo.models  # noqa: F401  (their classes can be named without their modules)
from tenzoo.cli.configs import PARSER_MODE, check_configs
from tenzoo.cli.messages import explain
from tenzoo.compression import Plan, apply_, plan
from tenzoo.weights import load_weights_

PLAN, WEIGHTS = "plan.json", "weights.pt"
"""What is written."""


def compress(
    network: nn.Module,
    weights: str,
    output: str,
    factorization: str,
    budget: int | float | None = None,
    ranks: int | float | dict[str, int | float | list[int]] | None = None,
    exclude: list[str] | None = None,
    calibration: LightningDataModule | None = None,
    calibration_size: int = 128,
) -> Plan:
    """Compress a trained network, and write plan.json and weights.pt into a folder.

    Args:
        network: The dense network, a class_path with init_args.
        weights: File of its weights: a state dict, a checkpoint of Lightning, or a .safetensors file.
        output: Folder for the plan and the weights, which are not there yet.
        factorization: cp, tucker, tt, tr or btt.
        budget: Of parameters: a fraction of the whole network's, such as 0.4, or a number of them.
        ranks: In place of a budget: one rank for all layers, or a rank for each by name.
        exclude: Names of layers that stay dense.
        calibration: Data whose training inputs, without labels, tell which part of each weight matters.
        calibration_size: How many of them are used.
    """
    folder = Path(output)
    if not output or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"expected a folder, there already or not, in `output`, got {output!r}")
    for name in (PLAN, WEIGHTS):
        if (folder / name).exists():
            raise ValueError(f"expected a folder without {name} in `output`, got {output!r}, where there is one")
    if isinstance(calibration_size, bool) or calibration_size < 1:
        raise ValueError(f"expected an int >= 1 in `calibration_size`, got {calibration_size}")
    load_weights_(network, weights)
    inputs = None if calibration is None else _inputs(calibration, calibration_size)
    made = plan(
        network, factorization=factorization, budget=budget, ranks=ranks, calibration=inputs, exclude=exclude or []
    )
    apply_(network, made, calibration=inputs)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(folder / PLAN)
    torch.save(network.state_dict(), folder / WEIGHTS)
    return made


def compress_command(argv: Sequence[str]) -> int:
    """Compress the network of a config, print the plan, and say how it is trained further."""
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
        raise ValueError(explain(str(error), parser)) from error
    arguments.pop("config")
    print(compress(**arguments))
    folder = arguments["output"]
    print(
        f"Written: {folder}/{PLAN} and {folder}/{WEIGHTS}. Train it further as the network "
        f"tenzoo.models.CompressedNetwork of these two files, as configs/tt_resnet20_compressed.yaml does."
    )
    return 0


def _inputs(data: LightningDataModule, size: int) -> Tensor:
    """The first training inputs."""
    data.prepare_data()
    data.setup("fit")
    inputs: list[Tensor] = []
    for number, batch in enumerate(data.train_dataloader()):
        if sum(map(len, inputs)) >= size:
            break
        inputs.append(_first(data.on_after_batch_transfer(batch, number)))
    return torch.cat(inputs)[:size]


def _first(batch: Any) -> Tensor:
    first = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(first, Tensor):
        raise ValueError(
            f"expected batches whose first item is a tensor from `calibration`, got {type(first).__name__}"
        )
    return first
