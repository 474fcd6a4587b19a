"""The number of processes, by the launcher and by the Trainer."""

import os

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]


def check_world_size(trainer: Trainer) -> None:
    """Refuse a Trainer that would train alone in each of several processes.

    Raises:
        ValueError: With both numbers, and the arguments to set.
    """
    launcher, variable = _launcher()
    started = os.environ.get(variable, "")
    if started.isdecimal() and int(started) != trainer.world_size:
        raise ValueError(
            f"expected as many processes in the Trainer as {launcher} started, got {trainer.world_size} where "
            f"{variable} is {started}: each would train alone; set trainer.devices to the processes on a node "
            "(with accelerator: cpu, 'auto' is 1), trainer.num_nodes to the nodes, and trainer.strategy to ddp"
        )


def _launcher() -> tuple[str, str]:
    """The name of the launcher of this process, and the variable with the number of processes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun", "WORLD_SIZE"
    if "RANK" in os.environ:  # as in a Kubernetes PyTorchJob; Lightning sets WORLD_SIZE in its own processes, no RANK
        return "the cluster", "WORLD_SIZE"
    if SLURMEnvironment.detect():
        return "Slurm", "SLURM_NTASKS"
    return "mpirun", "OMPI_COMM_WORLD_SIZE"
