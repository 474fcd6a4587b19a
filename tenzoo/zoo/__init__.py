"""The zoo: names of models, and what is known of them.

Example:
    >>> from tenzoo.zoo import create_model, list_models
    >>> list_models("tr_resnet20*")
    ['tr_resnet20_cifar10']
    >>> network = create_model("tr_resnet20_cifar10")
"""

from tenzoo.zoo.models import ModelInfo, create_model, list_models, load_task, model_info
from tenzoo.zoo.results import Result

__all__ = ["ModelInfo", "Result", "create_model", "list_models", "load_task", "model_info"]
