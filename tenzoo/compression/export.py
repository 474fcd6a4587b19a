"""A model as a file that runs without tenzoo: a program of PyTorch, or ONNX."""

import copy
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tenzoo.atomic import atomic_write
from tenzoo.compression.calls import Call, tensors_in
from tenzoo.compression.exported_files import file_format, quiet, refusing
from tenzoo.compression.fold import fold_
from tenzoo.compression.reading import Example, read_call
from tenzoo.compression.replaceable import check_module
from tenzoo.layers import TensorizedLayer
from tenzoo.layers.table import TensorizedTable

_TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output."""

_ROUNDINGS = 8
"""Largest difference in roundings, for types that are too narrow for the tolerance."""


@dataclass(frozen=True)
class _Axis:
    """A size that may change from call to call.

    Args:
        name: What it is called.
        dim: Which of the sizes of an input it is.
        size: That of the example.
    """

    name: str
    dim: int
    size: int

    @property
    def words(self) -> str:
        """What a message calls it."""
        return {"batch": "batch size", "length": "length"}[self.name]

    def has(self, x: Tensor) -> bool:
        """Whether an input has this size."""
        return x.ndim > self.dim and x.shape[self.dim] == self.size

    def resized(self, call: Call, wanted: int) -> Call:
        """The entries of an example of this size, repeated or cut to another."""

        def taken(x: Tensor) -> Tensor:
            places = torch.arange(wanted) % self.size
            return x.index_select(self.dim, places) if self.has(x) else x

        return call.map(taken)


def export(
    model: nn.Module,
    path: str | Path,
    example_input: Example,
    *,
    factors: bool = False,
    dynamic_batch: bool = True,
    dynamic_length: bool = False,
) -> None:
    """Write a model in evaluation mode to a file that runs without tenzoo, on the CPU.

    Before this function returns, the file is loaded again and run on the example and with each size that may change as
    1, 2 and 3: each of its outputs y' must agree with the model's y, ``max|y' − y| ≤ 1e-4 max|y|`` (8 roundings in half
    precision). If anything fails, no file is left.

    Args:
        model: A model that stays as it is.
        path: The file to write: a program of :mod:`torch.export` if it ends in ``.pt2``, an ONNX graph with at most
            2 GB of weights if it ends in ``.onnx``.
        example_input: What the model is called with, in any of the forms of :mod:`~tenzoo.compression.reading`. The
            program in a ``.pt2`` is called in the same way. The inputs of an ONNX graph are the tensors of the example,
            in the order of the model's arguments. The numbers of the example are not in the file.
        factors: Whether the file has the cores, and is as small as they are. Layers with the implementation ``"auto"``
            then do what is cheaper for large batches, and embeddings compute the wanted rows alone; onnxruntime
            reconstructs weights once, when it loads the file. By default the file has the dense weights that the cores
            reconstruct, as after :func:`~tenzoo.compression.fold_`.
        dynamic_batch: Whether the file takes batches of any size. The batch size is the first size of the first input
            that has any, and of all inputs with the same first size. Otherwise the file takes batches of the example's
            size only.
        dynamic_length: Whether the file takes sequences of any length, as those of tokens ``(N, T)``. The length is the
            second size of the first input that has one, and of all inputs with the same second size.

    Raises:
        TypeError: If the example holds something other than tensors and None.
        ValueError: If the path ends in something else, torch cannot follow the model, the model's batch size or
            length is fixed, its weights do not fit into an ONNX file, or the outputs of the file are not the model's.
        FileExistsError: If there is a file already.
        FileNotFoundError: If there is no folder for it.
        OSError: If it cannot be written.
        ImportError: If a package for ONNX is missing.

    Example:
        >>> from tenzoo.layers import TensorizedLinear
        >>> model = nn.Sequential(TensorizedLinear(64, 10, factorization="tt", rank=4))
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(model, Path(folder) / "model.pt2", torch.randn(1, 64), factors=True)
        ...     program = torch.export.load(Path(folder) / "model.pt2").module()
        >>> program(torch.randn(5, 64)).shape
        torch.Size([5, 10])
    """
    path = Path(path)
    target = file_format(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a file in an existing folder in `path`, got {str(path)!r}")
    _check_free(path)
    check_module(model)
    example = _checked(read_call(example_input, "example_input", model), model)
    axes = _axes(example, dynamic_batch=dynamic_batch, dynamic_length=dynamic_length)
    copied = _copied(model)
    with torch.no_grad():
        first = example.run(copied, "example_input")
        trials = [(example, first)]
        for axis in axes:
            sized = [axis.resized(example, number) for number in (1, 2, 3)]
            refused = f"expected a model that takes any {axis.words} in `model`, unless dynamic_{axis.name}=False"
            with refusing(refused):
                trials += [(inputs, inputs.on(copied)) for inputs in sized]
        program = _program(_contracting(copied) if factors else _folded(copied), example, axes)
        _check_free(path)
        with atomic_write(path) as file:
            target.write(program, file, [_names_of_axes(x, axes) for x in example.tensors], _names(first))
            with refusing("expected a file that runs as the model does", {str(file): path.name}), quiet():
                run = target.load(file)
                found = [run(inputs) for inputs, _ in trials]
            for actual, (_, expected) in zip(found, trials, strict=True):
                _compare(actual, tensors_in(expected))
            _check_free(path)


# --- arguments -----------------------------------------------------------------------------------------------------


def _check_free(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"expected a new file in `path`, got {str(path)!r}, which exists")


def _checked(call: Call, model: nn.Module) -> Call:
    """The call on the CPU, its named arguments in the order of the model's."""
    for leaf in pytree.tree_leaves((call.args, dict(call.kwargs))):
        if leaf is not None and not isinstance(leaf, Tensor):
            raise TypeError(f"expected tensors and None alone in `example_input`, got a {type(leaf).__name__}")
    order = list(inspect.signature(model.forward).parameters)
    names = sorted(call.kwargs, key=lambda name: order.index(name) if name in order else len(order))
    return Call(call.args, {name: call.kwargs[name] for name in names}).map(lambda x: x.detach().cpu())


def _axes(example: Call, *, dynamic_batch: bool, dynamic_length: bool) -> list[_Axis]:
    """The sizes that may change; a batch or a length that no input has is none."""
    wanted = {"batch": dynamic_batch, "length": dynamic_length}
    axes = []
    for dim, name in enumerate(wanted):
        size = next((x.shape[dim] for x in example.tensors if x.ndim > dim), 0)
        if name == "length" and dynamic_length and size == 0:
            raise ValueError(
                "expected an input of shape (N, T, …) in `example_input` with dynamic_length=True, got none"
            )
        if wanted[name] and size > 0:
            axes.append(_Axis(name, dim, size))
    return axes


def _names_of_axes(x: Tensor, axes: Sequence[_Axis]) -> dict[int, str]:
    return {axis.dim: axis.name for axis in axes if axis.has(x)}


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the model in evaluation mode, on the CPU, without compiled code."""
    model = getattr(model, "_orig_mod", model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"expected numbers in `model`, got {name!r} on the meta device")
    with refusing("expected a model that can be copied in `model`"):
        return copy.deepcopy(model).cpu().eval()


# --- programs ------------------------------------------------------------------------------------------------------


def _folded(model: nn.Module) -> nn.Module:
    return model.to_dense() if isinstance(model, TensorizedLayer) else fold_(model)


def _contracting(model: nn.Module) -> nn.Module:
    """The model with tables that compute the wanted rows alone."""
    for module in model.modules():
        # For a very large batch, a table would be reconstructed in every call, or be whole in memory all the time.
        if isinstance(module, TensorizedTable) and module.implementation == "auto":
            module.implementation = "contract"
    return model


def _program(model: nn.Module, example: Call, axes: Sequence[_Axis]) -> torch.export.ExportedProgram:
    traced = example
    for axis in axes:
        traced = axis.resized(traced, max(2, axis.size))  # a size of 1 would be taken for a constant
    changing = " and ".join(f"any {axis.words} unless dynamic_{axis.name}=False" for axis in axes)
    any_size = f", for {changing}," if axes else ""
    with refusing(f"expected a model that torch.export can follow{any_size} in `model`"), quiet():
        program = torch.export.export(
            model, traced.args, dict(traced.kwargs), dynamic_shapes=_shapes(model, example, axes)
        )
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes:
            node.meta.pop("stack_trace", None)  # it has the names of files on this machine
    return program


def _shapes(model: nn.Module, example: Call, axes: Sequence[_Axis]) -> dict[str, Any]:
    """By argument, the sizes that may change; ``*args`` is one argument."""
    dims = {axis.name: torch.export.Dim(axis.name) for axis in axes}
    given = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
    shapes: dict[str, Any] = pytree.tree_map(
        lambda x: (
            {dim: dims[name] for dim, name in _names_of_axes(x, axes).items()} or None
            if isinstance(x, Tensor)
            else None
        ),
        dict(given),
    )
    return shapes


# --- outputs -------------------------------------------------------------------------------------------------------


def _names(outputs: Any) -> list[str]:
    """The path to each output, such as ``output_0`` in a tuple and ``output_logits`` in a dict."""
    leaves = pytree.tree_flatten_with_path(outputs)[0]
    paths = [path for path, leaf in leaves if isinstance(leaf, Tensor)]
    return ["_".join(["output", *re.findall(r"\w+", pytree.keystr(path))]) for path in paths]


def _compare(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    shapes, wanted = ([tuple(y.shape) for y in outputs] for outputs in (actual, expected))
    if shapes != wanted:
        raise ValueError(f"expected a file with the outputs of `model`, of shapes {wanted}, got shapes {shapes}")
    for found, y in zip(actual, expected, strict=True):
        allowed = _TOLERANCE
        if y.is_floating_point():
            allowed = max(allowed, _ROUNDINGS * torch.finfo(y.dtype).eps)
        error = _error(found, y)
        if not error <= allowed:
            raise ValueError(
                f"expected a file whose outputs differ by at most {allowed:.0e} of the largest from those of `model`, "
                f"got {error:.1e}"
            )


def _error(actual: Tensor, expected: Tensor) -> float:
    wide = torch.promote_types(expected.dtype, torch.float64)
    a, b = actual.to(wide), expected.to(wide)
    differing = ~((a == b) | (a.isnan() & b.isnan()))
    if not differing.any():
        return 0.0
    return float((a - b)[differing].abs().max() / b.nan_to_num(0, 0, 0).abs().max())
