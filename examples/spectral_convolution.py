"""A Fourier neural operator with a weight of tltorch, trained by Adam, with SAM, and with Deviation-Aware Scaling.

The operator learns to solve the heat equation on a ring: from u(x, 0), a random smooth function, to u(x, T). Its
spectral convolution multiplies the low Fourier modes of all channels by a complex weight, which is a Tucker tensor of
tltorch: after ``register_tltorch()`` one group of four cores, and every method of tenzoo trains them. The error is
relative, on functions that were not trained on; on so small and noiseless a problem the methods differ little.

    python examples/spectral_convolution.py
"""

import logging
import math
import warnings

import torch
from lightning.pytorch import Trainer
from tltorch import FactorizedTensor
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from tenzoo import find_core_groups
from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.guests import register_tltorch
from tenzoo.tasks import Task

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
POINTS, MODES, WIDTH, DIFFUSION = 64, 10, 16, 0.04


def heat(count: int) -> tuple[Tensor, Tensor]:
    """Functions ``(N, 1, 64)`` before and after: mode k of a ring of length 2π decays by ``exp(-κ k² T)``."""
    k = torch.arange(POINTS // 2 + 1)
    before = torch.randn(count, 1, len(k), dtype=torch.cfloat) * torch.exp(-((k / 4) ** 2)) * math.sqrt(POINTS)
    return torch.fft.irfft(before, POINTS), torch.fft.irfft(before * torch.exp(-DIFFUSION * k**2), POINTS)


class SpectralConv(nn.Module):
    """Li et al. 2021, arXiv:2010.08895, with the weight in Tucker format."""

    def __init__(self) -> None:
        super().__init__()
        shape, rank = (WIDTH, WIDTH, MODES), (8, 8, 6)
        weight = FactorizedTensor.new(shape, rank=rank, factorization="ComplexTucker", dtype=torch.cfloat)
        self.weight = weight.normal_(std=1 / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.fft.rfft(x)[..., :MODES]
        return torch.fft.irfft(torch.einsum("bik,iok->bok", low, self.weight.to_tensor()), POINTS)


class Operator(Task):
    def __init__(self, **kwargs: object) -> None:
        super().__init__(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3), **kwargs)
        self.lift, self.project = nn.Conv1d(1, WIDTH, 1), nn.Conv1d(WIDTH, 1, 1)
        self.spectral, self.pointwise = SpectralConv(), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, u: Tensor) -> Tensor:
        u = self.lift(u)
        return self.project(F.gelu(self.spectral(u) + self.pointwise(u)))

    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        before, after = batch
        return (self(before) - after).square().sum((1, 2)).mean()

    @torch.no_grad()
    def error(self, before: Tensor, after: Tensor) -> float:
        return ((self(before) - after).norm() / after.norm()).item()


def fit(*callbacks: DeviationAwareScaling, sam: dict[str, float] | None = None) -> str:
    torch.manual_seed(0)
    train, test = heat(512), heat(512)
    task = Operator(sam=sam)
    before = task.error(*test)
    batches = DataLoader(TensorDataset(*train), batch_size=32, shuffle=True)
    Trainer(max_epochs=15, callbacks=list(callbacks), accelerator="cpu", **QUIET).fit(task, batches)
    return f"{100 * before:>12.3f} %{100 * task.error(*test):>12.3f} %"


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*(LeafSpec|many workers|GPU available).*")  # Lightning's own
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    register_tltorch()
    for group in find_core_groups(Operator()):
        print(f"{group.name}: {len(group.cores)} cores")
    print(f"{'':8}{'error before':>14}{'error after':>14}")
    print(f"{'Adam':8}{fit()}")
    print(f"{'SAM':8}{fit(sam={'rho': 0.01})}")
    print(f"{'DAS':8}{fit(DeviationAwareScaling(alpha=3))}")
