"""Compress the published ResNet-20 and -32 for CIFAR-10, and print the accuracy on the test set as a Markdown table.

Columns: decomposed by the weights alone; with 512 training images, without labels, as calibration data; with the cores
refined on the same images; and, for ResNet-20, the latter after one epoch of SGD with labels.

    python docs/compress_resnets.py --weights FOLDER --data data/cifar10 [--formats tt tr tucker cp] [--depths 20 32]
"""

import argparse
import copy
import logging
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from tenzoo.compression import apply_, plan, refine_
from tenzoo.data import CIFAR10DataModule
from tenzoo.models import CIFARResNet
from tenzoo.tasks import ImageClassificationTask

RATIOS = (2, 3, 5)
IMAGES = 512


def data(root: str, **kwargs: object) -> CIFAR10DataModule:
    """All 50,000 training images, normalized as the published weights expect."""
    return CIFAR10DataModule(root, normalization="imagenet", validation_size=0, **kwargs)


def calibration(root: str) -> Tensor:
    """Training images, as they are."""
    module = data(root, augment=False, batch_size=IMAGES)
    module.setup("fit")
    return module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)[0]


def trainer(epochs: int) -> Trainer:
    """Without anything around it."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(max_epochs=epochs, accelerator="cpu", precision="bf16-mixed", enable_model_summary=False, **quiet)


def task(network: nn.Module) -> ImageClassificationTask:
    """Plain SGD on the labels, for as few epochs as here."""

    def sgd(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-5, foreach=True)

    return ImageClassificationTask(network, optimizer=sgd, lr_scheduler="one_cycle")


def accuracy(network: nn.Module, root: str) -> float:
    """On the test set, in percent."""
    return 100 * trainer(1).test(task(network), data(root), verbose=False)[0]["test/accuracy"]


def trained(network: nn.Module, root: str) -> nn.Module:
    """After one epoch."""
    torch.manual_seed(0)
    module = task(network)
    trainer(1).fit(module, data(root, batch_size=128))
    return network


def main() -> None:
    """Print one row per network, format and ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--formats", nargs="+", default=["tt", "tr", "tucker", "cp"])
    parser.add_argument("--depths", nargs="+", type=int, default=[20, 32])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images = calibration(arguments.data)
    print("| network | format | ÷ | parameters | plain | calibrated | refined | after one epoch |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for depth in arguments.depths:
        (path,) = arguments.weights.glob(f"resnet{depth}-*.th")
        dense = CIFARResNet(depth).load_pretrained(path)
        name = f"ResNet-{depth}"
        size = sum(parameter.numel() for parameter in dense.parameters())
        print(f"| {name} | dense | 1 | {size:,} | {accuracy(dense, arguments.data):.2f} % | | | |", flush=True)
        for factorization in arguments.formats:
            for ratio in RATIOS:
                found = []
                for inputs in (None, images):
                    made = plan(dense, factorization=factorization, budget=1 / ratio, calibration=inputs)
                    small = apply_(copy.deepcopy(dense), made, calibration=inputs)
                    found.append(f"{accuracy(small, arguments.data):.2f} %")
                refine_(small, dense, calibration=images)
                found.append(f"{accuracy(small, arguments.data):.2f} %")
                after = f"{accuracy(trained(small, arguments.data), arguments.data):.2f} %" if depth == 20 else ""
                row = (name, factorization.upper(), ratio, f"{made.parameters:,}", *found, after)
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
