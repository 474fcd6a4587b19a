"""Foreign layers that train under tenzoo's methods as if they were its own."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from tenzoo.cores import CoreGroup, register_core_groups


def register_tltorch() -> None:
    """Teach :func:`~tenzoo.cores.find_core_groups` the factorized tensors and the contraction layer of tltorch.

    From then on every layer that holds such a tensor (``FactorizedLinear``, ``FactorizedConv``,
    ``FactorizedEmbedding``, ``TRL``, and models made of them) trains under SAM, DAS and the other methods. Known are
    CP, Tucker, tensor train and block tensor train, tensorized and complex ones included, and ``TCL``. Dense tensors
    have no cores.

    The cores are the ``nn.Parameter`` objects that the tensor is rebuilt from: the factors, Tucker's core, and CP's
    ``weights`` where they are a parameter, since CP is linear in them too. Where they are a buffer they are a constant
    of the tensor and no core. Parameters that a hook adds, such as the weights of tltorch's lasso, are in no group.

    It can be called any number of times, before or after the layers are made, but before training. With the command
    line, call it in the module that defines the model, which is imported as soon as its ``class_path`` is read::

        # my_models.py, for `python -m tenzoo fit --model my_models.Classifier ...`
        from tenzoo.guests import register_tltorch

        register_tltorch()

    tltorch sets TensorLy's backend to PyTorch when it is imported, and needs it there.

    Raises:
        ImportError: If tltorch is not installed, or opt_einsum, where tltorch asks for it.

    Example:
        >>> import tensorly
        >>> backend = tensorly.get_backend()
        >>> register_tltorch()
        >>> from tltorch import FactorizedLinear
        >>> from tenzoo import find_core_groups
        >>> layer = FactorizedLinear((2, 3), (3, 4), factorization="cp", rank=2)
        >>> [(group.name, len(group.cores)) for group in find_core_groups(layer)]  # four factors, and CP's weights
        [('weight', 5)]
        >>> tensorly.set_backend(backend)
    """
    try:
        import tltorch
    except ModuleNotFoundError as error:
        if error.name not in ("tltorch", "opt_einsum"):
            raise
        raise ImportError(
            f"expected tltorch and opt_einsum to be installed, got no {error.name}; run pip install 'tenzoo[tltorch]'"
        ) from error
    # Their tensorized and complex forms are subclasses. FactorizedTensor itself would take in the dense ones.
    register_core_groups(tltorch.CPTensor, lambda tensor: _group(_parameters(tensor, "weights"), tensor.factors))
    register_core_groups(tltorch.TuckerTensor, lambda tensor: _group(_parameters(tensor, "core"), tensor.factors))
    register_core_groups(tltorch.TTTensor, lambda tensor: _group([], tensor.factors))
    register_core_groups(tltorch.BlockTT, lambda tensor: _group([], tensor.factors))
    register_core_groups(
        tltorch.TCL, lambda layer: _as_group(_parameters(layer, *(f"factor_{mode}" for mode in range(layer.order))))
    )


def _parameters(module: nn.Module, *names: str) -> list[nn.Parameter]:
    """Those of the names that are parameters, in the order of the names.

    Attribute access would not do: complex tensors answer it with a view. A parameter under two names comes twice, so
    that its group is refused: the tensor is not linear in it.
    """
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    return [own[name] for name in names if name in own]


def _group(own: list[nn.Parameter], factors: Any) -> list[CoreGroup]:
    return _as_group([*own, *_parameters(factors, *factors.keys)])


def _as_group(cores: Iterable[nn.Parameter]) -> list[CoreGroup]:
    cores = tuple(cores)
    return [CoreGroup("", cores)] if cores else []
