"""Models of the zoo for torch.hub: ``torch.hub.load("OWNER/tenzoo", "tr_resnet20_cifar10", pretrained=True)``."""

from functools import partial
from typing import Any

from tenzoo.zoo import create_model, list_models

dependencies = ["torch", "torchvision", "lightning", "tensorly", "torchmetrics", "jsonargparse", "safetensors"]


def _entry(name: str) -> Any:
    entry: Any = partial(create_model, name)
    entry.__doc__ = f"{name}: see tenzoo.zoo.create_model."
    return entry


globals().update({name: _entry(name) for name in list_models() if name.isidentifier()})
