"""Parameter-efficient fine-tuning with cores: adapters for PEFT, and updates for any frozen layer."""

try:
    import peft  # noqa: F401
except ImportError as error:
    raise ImportError("tenzoo.adapters needs PEFT: pip install 'tenzoo[text]'") from error

from tenzoo.adapters.config import TensorAdapterConfig
from tenzoo.adapters.layer import TensorAdapterLayer
from tenzoo.adapters.sharding import shard_frozen_
from tenzoo.adapters.tuner import TensorAdapterModel

__all__ = ["TensorAdapterConfig", "TensorAdapterLayer", "TensorAdapterModel", "shard_frozen_"]
