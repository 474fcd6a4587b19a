"""Tensorized models: plain ``nn.Module`` classes."""

from tenzoo.models.completion import TensorCompletion
from tenzoo.models.compressed_network import CompressedNetwork
from tenzoo.models.decoder import Decoder
from tenzoo.models.ensemble import CompletionEnsemble
from tenzoo.models.pretrained_transformer import PretrainedTransformer
from tenzoo.models.resnet import CIFARResNet

__all__ = [
    "CIFARResNet",
    "CompletionEnsemble",
    "CompressedNetwork",
    "Decoder",
    "PretrainedTransformer",
    "TensorCompletion",
]
