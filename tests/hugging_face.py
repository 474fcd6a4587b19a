"""The linear layer of Hugging Face's transformers, or the same where transformers is not installed."""

import sys
from types import ModuleType

import torch
from torch import Tensor, nn

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:

    class Conv1D(nn.Module):
        """``y = x W + b`` with ``W (nx, nf)``."""

        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.empty(nx, nf))
            self.bias = nn.Parameter(torch.zeros(nf))
            nn.init.normal_(self.weight, std=0.02)

        def forward(self, x: Tensor) -> Tensor:
            return (x.reshape(-1, self.nx) @ self.weight + self.bias).reshape(*x.shape[:-1], self.nf)

    # Only the module: the class stays where it can be imported from, as the command line does with subclasses.
    module = sys.modules["transformers.pytorch_utils"] = ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D

__all__ = ["Conv1D"]
