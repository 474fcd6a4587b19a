"""Settings that Lightning takes and fails on later, or ignores."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

_AT_LEAST = {"check_val_every_n_epoch": 1, "log_every_n_steps": 0, "num_sanity_val_steps": -1}
"""Arguments of the Trainer, and the smallest number that means something."""

_LIMITS = {
    "fit": "limit_train_batches",
    "validate": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}
"""What bounds the batches that a command is for."""

_LAUNCHERS = {
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "MASTER_PORT"), 1),
    **dict.fromkeys(("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID"), 0),
}
"""Environment variables with which processes find each other, and the smallest number of each."""


_MEETING = frozenset({"MASTER_ADDR", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LSB_JOBID"})
"""One of these variables tells the processes of several nodes where to meet."""


def check_trainer(settings: Mapping[str, Any], command: str | None) -> None:
    """Refuse numbers of the Trainer by which it would divide, or that it would not look at, and a command for nothing.

    Raises:
        ValueError: Naming the argument.
    """
    for name, least in _AT_LEAST.items():
        value = settings.get(name)
        if value is not None and value < least:
            raise ValueError(f"expected an int >= {least} or null in `trainer.{name}`, got {value}")
    nodes = settings.get("num_nodes")
    if isinstance(nodes, int) and nodes > 1 and not _MEETING.intersection(os.environ):
        raise ValueError(
            f"expected the address of the first node in the environment variable MASTER_ADDR for `trainer.num_nodes` "
            f"{nodes}, got none, and each process would wait for the others without end; start it with torchrun or srun"
        )
    interval = settings.get("val_check_interval")
    if isinstance(interval, int | float) and interval <= 0:
        raise ValueError(f"expected a positive number or null in `trainer.val_check_interval`, got {interval}")
    limit = _LIMITS.get(command or "")
    if limit is not None and settings.get(limit) == 0:
        raise ValueError(
            f"expected a positive number or null in `trainer.{limit}` for {command}, got 0: no batch at all"
        )


def tell_of_emulated_precision(trainer: Trainer) -> None:
    """Say so where an x86 processor has no arithmetic in bfloat16: to emulate it takes longer than float32."""
    x86 = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2", "AVX512")
    has_it = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if trainer.strategy.root_device.type == "cpu" and trainer.precision.startswith("bf16") and x86 and not has_it:
        rank_zero_info(
            f"this processor has no bfloat16 arithmetic: {trainer.precision} is slower than --trainer.precision 32-true"
        )


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse two callbacks whose states would have one name in a checkpoint, which the Trainer takes for a defect.

    Raises:
        ValueError: Naming their class.
    """
    stateful = [each for each in callbacks if is_overridden("state_dict", each, parent=Callback)]
    for key, number in Counter(each.state_key for each in stateful).items():
        if number > 1:
            name = next(type(each).__name__ for each in stateful if each.state_key == key)
            raise ValueError(
                f"expected one {name} with these settings in `trainer.callbacks`, got {number}; leave one out"
            )


def check_seed(seed: object) -> None:
    """Refuse a seed that numpy would not take.

    Raises:
        ValueError: Naming the argument.

    Example:
        >>> check_seed(-3)
        Traceback (most recent call last):
            ...
        ValueError: expected an int in [0, 4294967295] or a bool in `seed_everything`, got -3
    """
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise ValueError(f"expected an int in [0, {2**32 - 1}] or a bool in `seed_everything`, got {seed}")


def check_command(argv: Sequence[str], commands: Sequence[str]) -> None:
    """Refuse a command line that begins with neither a command nor an option.

    Raises:
        ValueError: Naming the commands.
    """
    if not argv or (argv[0] not in commands and not argv[0].startswith("-")):
        got = repr(argv[0]) if argv else "none"
        if argv and (similar := get_close_matches(argv[0], commands, n=1)):
            got += f"; did you mean {similar[0]!r}?"
        raise ValueError(f"expected a command, one of {', '.join(sorted(commands))}, got {got}")


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what a launcher of several processes cannot have set: a process alone would train in silence.

    Raises:
        ValueError: Naming the variable.

    Example:
        >>> check_environment({"WORLD_SIZE": "2", "RANK": "1"})
        >>> check_environment({"WORLD_SIZE": "two"})
        Traceback (most recent call last):
            ...
        ValueError: expected an int >= 1 in the environment variable WORLD_SIZE, got 'two'
    """
    numbers: dict[str, int] = {}
    for name, least in _LAUNCHERS.items():
        if (text := environment.get(name)) is None:
            continue
        number = int(text) if text.strip().lstrip("-").isdecimal() else least - 1
        if number < least:
            raise ValueError(f"expected an int >= {least} in the environment variable {name}, got {text!r}")
        numbers[name] = number
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in numbers and size in numbers and numbers[rank] >= numbers[size]:
            got = f"{numbers[rank]} of {numbers[size]}"
            raise ValueError(f"expected an int below {size} in the environment variable {rank}, got {got}")
