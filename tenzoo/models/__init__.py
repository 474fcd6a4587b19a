"""Tensorized models: plain ``nn.Module`` classes."""

from tenzoo.models.completion import TensorCompletion

__all__ = ["TensorCompletion"]
