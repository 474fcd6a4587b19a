"""Data and networks that are made on the spot, and fits of them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from typing_extensions import override

from benchmarks.gpu.run import Place
from benchmarks.loops import quiet
from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.data import CIFAR10DataModule
from tenzoo.data.images.batches import Images
from tenzoo.data.images.datamodule import PreparedImages
from tenzoo.models import CIFARResNet
from tenzoo.tasks import SAM, ImageClassificationTask
from tenzoo.training import NoProfiler

METHODS: dict[str, tuple[SAM | None, Callable[[], list[Callback]]]] = {
    "SGD": (None, list),
    "DAS": (None, lambda: [DeviationAwareScaling(0.01)]),
    "SAM": (SAM(0.05), list),
    "ASAM": (SAM(0.5, adaptive=True), list),
}
"""For each method its settings of SAM, and what makes its callbacks."""

CPU = Place(torch.device("cpu"))


class RandomImages(CIFAR10DataModule):
    """Images and labels drawn at random, in place of CIFAR-10's; batches come as from the real ones."""

    def __init__(self, count: int, side: int, **kwargs: Any) -> None:
        super().__init__(validation_size=0, download=False, **kwargs)
        self._count, self._side = count, side

    @override
    def prepare_data(self) -> None:
        """Nothing is on a disk."""

    @override
    def _prepare(self) -> PreparedImages:
        generator = torch.Generator().manual_seed(0)
        shape = (self._count, 3, self._side, self._side)
        image = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        label = torch.randint(10, (self._count,), generator=generator)
        images = Images(image, label)
        return PreparedImages({"train": images, "test": images}, label, {"dataset": "random"})


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """The optimizer of all networks here; at ten times the rate, rounding in half precision grows to 8 % of a loss."""
    return torch.optim.SGD(parameters, lr=0.001, momentum=0.9, nesterov=True, foreach=True)


def network(factorization: str | None = "tr") -> CIFARResNet:
    """The same network at every call."""
    torch.manual_seed(0)
    return CIFARResNet(20) if factorization is None else CIFARResNet(20, factorization=factorization, rank=10)


def classification(factorization: str | None = "tr", sam: SAM | None = None) -> ImageClassificationTask:
    """The same task at every call."""
    return ImageClassificationTask(network(factorization), optimizer=sgd, sam=sam)


def precision_of(precision: str, place: Place) -> dict[str, Any]:
    """Arguments of the Trainer. A loss scale of 2^10 overflows in no step, so that none is left out."""
    if precision != "16-mixed":
        return {"precision": precision}
    scaler = torch.amp.GradScaler(place.device.type, init_scale=2.0**10)
    return {"plugins": [MixedPrecision("16-mixed", place.device.type, scaler=scaler)]}


class Losses(Callback):
    """Keeps the loss of each batch, on the device."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.values.append(loss.detach().clone())


def trainer_of(place: Place, steps: int, callbacks: Iterable[Callback] = (), **kwargs: Any) -> Trainer:
    """A Trainer for so many steps, none of them logged."""
    defaults: dict[str, Any] = {
        "accelerator": place.device.type,
        "devices": 1,
        "max_steps": steps,
        "max_epochs": -1,
        "callbacks": list(callbacks),
        "logger": False,
        "log_every_n_steps": 10**6,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "profiler": NoProfiler(),
    }
    return Trainer(**{**defaults, **kwargs})


def fit(
    place: Place,
    task: LightningModule,
    data: LightningDataModule,
    steps: int,
    callbacks: Iterable[Callback] = (),
    **kwargs: Any,
) -> LightningModule:
    """Train in silence; the task, trained."""
    with quiet():
        trainer_of(place, steps, callbacks, **kwargs).fit(task, data)
    return task


def differing(first: nn.Module, second: nn.Module) -> tuple[int, int]:
    """How many tensors of two modules differ in a bit, and how many there are."""
    others = second.state_dict()
    pairs = [(value.cpu(), others[name].cpu()) for name, value in first.state_dict().items()]
    return sum(not torch.equal(a, b) for a, b in pairs), len(pairs)


@contextmanager
def deterministic() -> Iterator[None]:
    """Only kernels that compute the same bits at every call, in float32; what was set before is set again."""
    before = torch.are_deterministic_algorithms_enabled()
    with tf32(False):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether products and convolutions in float32 may round to ten bits; what was set before is set again."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
