"""The rows of the table of what is trained in two processes: problems and methods."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.compression import apply_, plan
from tenzoo.data import CIFAR10DataModule, CompletionDataModule
from tenzoo.models import CIFARResNet
from tenzoo.tasks import SAM, CompletionTask, DistillationTask, ImageClassificationTask, Task
from tests.tasks.toy import sgd, trainer

# --- problems ----------------------------------------------------------------------------------------------------


def entries(batch_size: int | None = 60, **changes: Any) -> CompletionDataModule:
    """180 entries to train on, unless it is said otherwise."""
    settings = {"shape": [6, 7, 8], "num_entries": 300, "observed_fraction": 0.6, "validation_fraction": 0.0}
    return CompletionDataModule("synthetic", **{**settings, "batch_size": batch_size, **changes})  # type: ignore[arg-type]


def images(root: str, batch_size: int = 8) -> CIFAR10DataModule:
    return CIFAR10DataModule(root, batch_size=batch_size, validation_size=10, download=False)


class StoredNorm(nn.BatchNorm2d):
    """Batch norm that always normalizes by its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def with_norm(network: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    """The network without batch norm, whose statistics would be those of a rank's own share."""
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(network, name, make(child.num_features))
        else:
            with_norm(child, make)
    return network


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def compressed() -> nn.Module:
    network = small()
    return apply_(network, plan(network, factorization="tt", budget=0.6))


def ring() -> nn.Module:
    return CIFARResNet(20, factorization="tr", rank=3)


def completion(factorization: str = "tt", **kwargs: Any) -> Callable[..., Task]:
    return lambda **method: CompletionTask(factorization, 2, init_std=0.5, **kwargs, **method)


def classification(network: Callable[[], nn.Module]) -> Callable[..., Task]:
    return lambda **method: ImageClassificationTask(network(), **method)


@dataclass(frozen=True)
class Problem:
    """A task and its data, the same for any number of processes."""

    task: Callable[..., Task]
    data: Callable[..., LightningDataModule]
    lr: float = 0.05


PROBLEMS = {
    "mean": Problem(completion(), lambda root: entries()),
    "sum": Problem(completion("tucker", reduction="sum"), lambda root: entries(), lr=0.001),
    "uneven": Problem(completion("tr"), lambda root: entries(37)),
    "uneven_sum": Problem(completion("cp", reduction="sum"), lambda root: entries(37), lr=0.001),
    # One process takes row-sparse gradients here; two cannot.
    "sparse": Problem(completion("cp"), lambda root: entries(37, shape=[300, 400, 500], num_entries=500)),
    "small": Problem(classification(compressed), lambda root: images(root)),
    "uneven_images": Problem(classification(compressed), lambda root: images(root, 7)),
    "distilled": Problem(
        lambda **method: DistillationTask(compressed(), teacher=small(), **method), lambda root: images(root)
    ),
    "resnet": Problem(
        classification(lambda: with_norm(ring(), lambda width: nn.GroupNorm(4, width))), lambda root: images(root)
    ),
    "resnet_evaluated": Problem(classification(lambda: with_norm(ring(), StoredNorm)), lambda root: images(root)),
}

# --- methods -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """Arguments of a task, and callbacks."""

    task: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list


def das(**kwargs: Any) -> Method:
    return Method({}, lambda: [DeviationAwareScaling(0.3, **kwargs)])


METHODS = {
    "plain": Method(),
    "das": das(),
    "das_global": das(normalizer="global"),
    "das_gauge_fixed": das(gauge_fixed=True),
    "sam": Method({"sam": SAM(rho=0.05)}),
    "sam_cores": Method({"sam": SAM(rho=0.05, scope="cores")}),
    "asam": Method({"sam": SAM(rho=0.5, adaptive=True)}),
    "clipped": Method({"gradient_clip_val": 0.01}),
    "accumulated": Method({"accumulate_grad_batches": 2}),
    "sam_accumulated": Method({"sam": SAM(rho=0.05), "accumulate_grad_batches": 2}),
    "asam_accumulated": Method({"sam": SAM(rho=0.5, adaptive=True), "accumulate_grad_batches": 3}),
    "sam_clipped": Method({"sam": SAM(rho=0.05), "gradient_clip_val": 0.01}),
    # Each rank climbs by its own batch: no single process does the same.
    "sam_alone": Method({"sam": SAM(rho=0.05, sync_ascent=False)}),
    "asam_alone": Method({"sam": SAM(rho=0.5, adaptive=True, sync_ascent=False)}),
}

# --- strategies --------------------------------------------------------------------------------------------------

STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    # The gradients are views of the memory that DDP reduces in.
    "views": lambda: DDPStrategy(gradient_as_bucket_view=True),
    "unused": lambda: DDPStrategy(find_unused_parameters=True),
    "small_buckets": lambda: DDPStrategy(bucket_cap_mb=1e-4, gradient_as_bucket_view=True),
}

# --- training ----------------------------------------------------------------------------------------------------


def run(
    problem: str,
    method: str,
    root: str,
    *,
    steps: int,
    precision: str = "64-true",
    strategy: str = "ddp",
    callbacks: list[Callback] | None = None,
    optimizer: Any = None,
    **kwargs: Any,
) -> tuple[Trainer, Task]:
    """Train a row from its one initialization; in a process of a group, as one of two."""
    torch.manual_seed(3)
    row, how = PROBLEMS[problem], METHODS[method]
    task = row.task(optimizer=optimizer or sgd(row.lr), **how.task)
    settings: dict[str, Any] = {"max_epochs": -1, "max_steps": steps, "precision": precision, "limit_val_batches": 0}
    if torch.distributed.is_torchelastic_launched():
        settings |= {"strategy": STRATEGIES[strategy](), "devices": 2}
    fit = trainer(callbacks=[*how.callbacks(), *(callbacks or [])], **{**settings, **kwargs})
    fit.fit(task, datamodule=row.data(root))
    return fit, task


def weights(task: Task) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in task.named_parameters()}
