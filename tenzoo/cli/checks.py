"""Settings that Lightning takes and fails on later, or ignores."""

import os
from collections.abc import Mapping
from typing import Any

_AT_LEAST = {"check_val_every_n_epoch": 1, "log_every_n_steps": 0, "num_sanity_val_steps": -1}
"""Arguments of the Trainer, and the smallest number that means something."""

_LAUNCHERS = {
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "MASTER_PORT"), 1),
    **dict.fromkeys(("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID"), 0),
}
"""Environment variables with which processes find each other, and the smallest number of each."""


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Refuse numbers of the Trainer by which it would divide, or that it would not look at.

    Raises:
        ValueError: Naming the argument.
    """
    for name, least in _AT_LEAST.items():
        value = settings.get(name)
        if value is not None and value < least:
            raise ValueError(f"expected an int >= {least} or null in `trainer.{name}`, got {value}")
    interval = settings.get("val_check_interval")
    if isinstance(interval, int | float) and interval <= 0:
        raise ValueError(f"expected a positive number or null in `trainer.val_check_interval`, got {interval}")


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
