"""Dense layers again for layers that are made of cores."""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from tenzoo.compression.holders import held_elsewhere
from tenzoo.compression.reasons import counterparts, does_more
from tenzoo.compression.replace import hand_on_bias, replace_modules, take_parametrization
from tenzoo.compression.replaceable import check_module, named_modules
from tenzoo.layers import TensorizedLayer, TensorizedWeight

M = TypeVar("M", bound=nn.Module)


def fold_(model: M) -> M:
    """Replace all layers with cores by the dense layers of torch that compute the same, in place.

    Args:
        model: Any module.

    Returns:
        The model itself.

    Raises:
        ValueError: If the model itself is a tensorized layer: call its :meth:`to_dense`. If a weight with cores has
            another parametrization as well. If a tensorized layer does more than the dense one would: it has hooks, a
            forward pass, parameters or modules of its own, or a plain attribute leads to it.

    Example:
        >>> from tenzoo.layers import TensorizedLinear
        >>> fold_(nn.Sequential(TensorizedLinear(8, 4, factorization="cp", rank=2)))
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    check_module(model)
    if isinstance(model, TensorizedLayer):
        raise ValueError(f"expected a model with tensorized layers in it, got a {type(model).__name__}; see to_dense()")
    parametrized = [
        (owner, name, f"{path}.{name}".lstrip("."), len(chain))
        for path, owner in named_modules(model)
        for name, chain in getattr(owner, "parametrizations", {}).items()
        if any(isinstance(part, TensorizedWeight) for part in chain)
    ]
    for _, _, full, length in parametrized:
        if length > 1:
            raise ValueError(
                f"expected weights that are made of cores alone in `model`, got {full!r} with {length - 1} more "
                f"parametrizations; remove them first"
            )
    for name, dense, reason in not_foldable(model):
        raise ValueError(f"expected cores that a {dense} can replace in `model`, got {name!r}, which {reason}")
    for owner, name, _, _ in reversed(parametrized):
        take_parametrization(owner, name)
    folded: dict[nn.Module, nn.Module] = {}
    weights: dict[tuple[nn.Module, torch.Size], nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, TensorizedLayer):
            dense = folded[module] = module.to_dense()
            hand_on_bias(module, dense)
            dense.weight = weights.setdefault(
                (module.factorization, dense.weight.shape), dense.weight
            )  # cores may be shared
    return replace_modules(model, folded)


def not_foldable(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Names of modules with cores that do more than their dense counterparts, with the counterpart and the reason."""
    modules = list(named_modules(model))
    held = held_elsewhere(modules)
    for name, module in modules:
        if not isinstance(module, TensorizedLayer | TensorizedWeight):
            continue
        parts: list[nn.Module | Tensor] = [*module.modules(), *module.factorization.cores]
        reason = does_more(module) or next((held[id(part)] for part in parts if id(part) in held), None)
        if isinstance(module, TensorizedWeight):
            path = [part for part in name.split(".")[:-1] if part != "parametrizations"]
            name, dense = ".".join(path), "Parameter"
        else:
            dense = type(module.to_dense()).__name__
            if type(module) not in counterparts().values():
                reason = f"is a {type(module).__module__}.{type(module).__qualname__}, a class of its own"
            elif {*module._parameters, *module._buffers, *module._modules} - {"factorization", "bias", "padding_row"}:
                reason = "has more than a weight and a bias"
        if reason is not None:
            yield name, dense, reason
