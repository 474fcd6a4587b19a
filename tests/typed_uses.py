"""Right and wrong uses for a type checker; a comment names what is wrong. ``tests/test_types.py`` reads it."""

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from tenzoo import CoreGroup, CoreProvider
from tenzoo.compression import plan
from tenzoo.data import CIFAR100DataModule, CompletionDataModule, MNISTDataModule
from tenzoo.factorizations import FactorizationName
from tenzoo.layers import TensorizedConv2d, TensorizedLinear
from tenzoo.models import CIFARResNet, TensorCompletion
from tenzoo.tasks import SAM, CompletionTask, DistillationTask, ImageClassificationTask, Task
from tenzoo.tasks.arguments import TaskArguments


def adam(cores: object) -> torch.optim.Optimizer:
    raise NotImplementedError


def tasks(network: nn.Module) -> None:
    CompletionTask("tucker", [8, 8, 2], init="uniform", sam=SAM(rho=0.1), gradient_clip_val=1.0, optimizer=adam)
    CompletionTask("tucker", "auto", search_minutes=1.5)
    CompletionTask("tucker", "automatic")  # wrong: arg-type
    CompletionTask("ar,br,cr->abc", 4, lr_scheduler="one_cycle", lr_scheduler_interval="step")
    CompletionTask(sma=3)  # wrong: call-arg
    CompletionTask(sam=0.1)  # wrong: arg-type
    CompletionTask(init="unifrom")  # wrong: arg-type
    CompletionTask(lr_scheduler="cosin")  # wrong: arg-type
    CompletionTask(gradient_clip_algorithm="nrom")  # wrong: arg-type
    ImageClassificationTask(network, num_classes=3, base_width=64, accumulate_grad_batches=2)
    ImageClassificationTask(network, base_with=64)  # wrong: call-arg
    DistillationTask(network, teacher=network, label_smoothing=0.1, sam=None)
    DistillationTask(network, teacher=network, temprature=2.0)  # wrong: call-arg
    SAM(scope="core")  # wrong: arg-type


def layers() -> None:
    layer = TensorizedConv2d(8, 8, 3, padding=1, factorization="my_formats.Ring", rank=1 / 8, implementation="contract")
    weight: Tensor = layer.weight
    dense: nn.Linear = TensorizedLinear.from_dense(nn.Linear(8, 8), factorization="tt", rank=4).to_dense()
    format: FactorizationName = "tucker"
    TensorizedLinear(8, 8, factorization=format, rank=4)
    TensorizedLinear(8, 8, factorization="tt", rank=4, implementation="contracted")  # wrong: arg-type
    TensorizedLinear(8, 8, factorization="tt", rank="4")  # wrong: arg-type
    TensorizedLinear(8, 8, factorization=nn.Linear, rank=4)  # wrong: arg-type
    TensorizedLinear(8, 8, factorization="tt")  # wrong: call-arg
    TensorCompletion((4, 5), "cp", 2, init="zeros")  # wrong: arg-type
    print(weight, dense, plan(CIFARResNet(20), factorization="auto", budget=0.5))
    CompletionDataModule("covid", standardise=True)  # wrong: call-arg
    MNISTDataModule("data", batch_size=64, noise=0.4)
    MNISTDataModule("data", batchsize=64)  # wrong: call-arg
    CIFAR100DataModule(noisy_validaton=True)  # wrong: call-arg


class Own(Task):
    def __init__(self, size: int, **kwargs: Unpack[TaskArguments]) -> None:
        super().__init__(**kwargs)
        self.core = nn.Parameter(torch.ones(size))

    def loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (batch * self.core).sum()


class Scale(nn.Module, CoreProvider):
    def core_groups(self) -> list[CoreGroup]:
        return [CoreGroup("weight", tuple(self.parameters()))]


def own() -> None:
    Own(3, sam=SAM())
    Own(3, smo=SAM())  # wrong: call-arg
