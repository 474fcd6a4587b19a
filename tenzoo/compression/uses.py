"""Which parameters a forward pass uses, and how many vectors their matrices multiply."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_MULTIPLYING = ("linear", *_RECURRENT, *(f"{name}_cell" for name in _RECURRENT))
"""Torch's functions whose first argument holds the vectors that the matrices in the others are multiplied by."""


class Uses(TorchFunctionMode):
    """Notes which parameters take part in what torch computes in this context.

    Args:
        parameters: Names of parameters by their ids.

    Attributes:
        used: Names of the parameters that any tensor was computed from.
        rows: By name, the number of vectors that a matrix was multiplied by, in linear, attention and recurrent layers.
    """

    def __init__(self, parameters: Mapping[int, str]) -> None:
        super().__init__()
        self.used: set[str] = set()
        self.rows: dict[str, float] = {}
        self._parameters = parameters

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Code that asks for a device or a dtype is content with the first parameter, whichever that is.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            for leaf in tree_leaves((args, kwargs)):
                if (name := self._parameters.get(id(leaf))) is not None:
                    self.used.add(name)
                    rows = _rows(getattr(func, "__name__", ""), name, [*args, *(kwargs or {}).values()])
                    if rows is not None:
                        self.rows[name] = self.rows.get(name, 0) + rows
        return result


def _rows(function: str, parameter: str, inputs: Sequence[Any]) -> float | None:
    """Number of vectors that a function multiplies a matrix by; None if unknown."""
    if function == "multi_head_attention_forward":
        query, key, value = (_vectors(x) for x in inputs[:3])
        own = {"in_proj_weight": (query + key + value) / 3, "k_proj_weight": key, "v_proj_weight": value}
        return own.get(parameter.rpartition(".")[2], query)
    if function in _MULTIPLYING:
        return _vectors(inputs[0])
    return None


def _vectors(x: Tensor) -> float:
    return x.numel() / x.shape[-1]
