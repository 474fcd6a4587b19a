"""Small tasks on small data, for tests of training itself."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from tenzoo.factorizations import Tucker
from tenzoo.tasks import Task


class Regression(Task):
    """A linear layer, then a Tucker matrix; batch norm and dropout in between if asked for."""

    def __init__(self, *, norm: bool = False, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.inner = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.weight = Tucker((5, 3), 2)
        self.losses: list[float] = []

    def error(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        hidden = self.dropout(self.norm(self.inner(x)).tanh())
        return (hidden @ self.weight.reconstruct() - y).square().mean()

    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.error(batch)
        self.log("train/mse", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.error(batch))


class Batches:
    """The same batches in every epoch."""

    def __init__(self, count: int = 4, size: int = 8, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.batches = [
            (torch.randn(size, 6, generator=generator), torch.randn(size, 3, generator=generator)) for _ in range(count)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


class Shares:
    """Each rank's part of some batches, in every epoch."""

    def __init__(self, batches: Iterable[tuple[Tensor, ...]], rank: int = 0, count: int = 1) -> None:
        self._batches = [tuple(part[rank::count] for part in batch) for batch in batches]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(self._batches)


def sgd(lr: float = 0.1, **kwargs: Any) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **kwargs)


def adam(lr: float = 0.01, **kwargs: Any) -> Any:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr, **kwargs)


def trainer(tmp_path: Path | None = None, **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 5,
        "log_every_n_steps": 1,
    }
    return Trainer(default_root_dir=tmp_path, **{**defaults, **kwargs})


def fitted(
    *,
    callbacks: Any = (),
    fit: dict[str, Any] | None = None,
    batches: Batches | None = None,
    seed: int = 1,
    **task: Any,
) -> Regression:
    """Train from one fixed initialization; 20 batches unless ``fit`` says otherwise."""
    torch.manual_seed(seed)
    model = Regression(**task)
    batches = batches or Batches()
    trainer(callbacks=list(callbacks), **(fit or {})).fit(model, batches, Batches(seed=9))
    return model


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    for (name, one), (_, two) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert one.equal(two), f"{name} differs by {(one - two).abs().max()}"
