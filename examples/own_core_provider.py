"""A layer of one's own that trains under SAM and Deviation-Aware Scaling.

``LowRankLinear`` says in one method which of its parameters are the cores of one tensor; every method of tenzoo finds
them there, and the task writes its loss. SAM and DAS shrink the Norm Deviation Q of the cores faster than plain SGD.

    python examples/own_core_provider.py
"""

import logging
import warnings

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tenzoo import CoreGroup, CoreProvider, find_core_groups
from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.dynamics import norm_deviation, squared_norms
from tenzoo.tasks import Task

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class LowRankLinear(nn.Module, CoreProvider):
    def __init__(self, num_inputs: int, num_outputs: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(num_inputs, rank))
        self.b = nn.Parameter(torch.randn(rank, num_outputs) / (num_inputs * rank) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(num_outputs))  # no core: it cannot be rescaled against one

    def core_groups(self) -> list[CoreGroup]:
        return [CoreGroup("weight", (self.a, self.b))]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ self.b + self.bias


class Regression(Task):
    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.layer = LowRankLinear(20, 10, rank=4)

    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return (self.layer(x) - y).square().sum(1).mean()


def fit(*callbacks: DeviationAwareScaling, sam: dict[str, float] | None = None) -> str:
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = x @ torch.randn(20, 4) @ torch.randn(4, 10) / 9 + 2 * torch.randn(512, 10)
    task = Regression(sam=sam, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.006))
    (group,) = find_core_groups(task)
    before = norm_deviation(squared_norms(group.cores)).item()
    batches = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    Trainer(max_epochs=20, callbacks=list(callbacks), accelerator="cpu", **QUIET).fit(task, batches)
    after, loss = norm_deviation(squared_norms(group.cores)).item(), task.loss((x, y), 0).item()
    return f"{before:>10.1f}{after:>10.1f}{loss:>10.3f}"


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*(LeafSpec|many workers|GPU available).*")  # Lightning's own
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"{'':8}{'Q before':>10}{'Q after':>10}{'loss':>10}")
    print(f"{'plain':8}{fit()}")
    print(f"{'SAM':8}{fit(sam={'rho': 0.1})}")
    print(f"{'DAS':8}{fit(DeviationAwareScaling(alpha=0.1))}")
