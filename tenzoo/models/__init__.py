"""Tensorized models: plain ``nn.Module`` classes."""

from tenzoo.models.completion import TensorCompletion
from tenzoo.models.resnet import CIFARResNet

__all__ = ["CIFARResNet", "TensorCompletion"]
