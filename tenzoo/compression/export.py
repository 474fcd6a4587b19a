"""A model as a file for other programs: torch.export and ONNX."""

import copy
import importlib
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tenzoo.atomic import atomic_write
from tenzoo.compression.apply import fold_
from tenzoo.compression.calls import Call, tensors_in
from tenzoo.compression.reading import Example, read_call
from tenzoo.compression.replaceable import check_module
from tenzoo.layers import TensorizedEmbedding, TensorizedLayer

Runner: TypeAlias = Callable[[Call], list[Tensor]]
"""A loaded file."""

_TOLERANCE = 1e-4
"""How far outputs may be off, relative to the largest of them."""

_ROUNDINGS = 8
"""The same in roundings, for numbers that are too narrow for the tolerance."""

_LARGEST = 2_000_000_000
"""Bytes of weights that an ONNX file can hold in itself."""

_SMALL = 64
"""Elements of a constant that ONNX's optimizer may compute from others: it folds shapes, and rebuilds no weights."""

_OF_RECURRENT_LAYERS = r"The tensor attributes? (self\.[\w.]*_flat_weights\[\d+\],? )+w\w+ assigned during export"
"""A warning about a list that torch's own layers keep."""


def export(
    model: nn.Module,
    path: str | Path,
    example_input: Example,
    *,
    factors: bool = False,
    dynamic_batch: bool = True,
) -> None:
    """Write a model in evaluation mode to a file that runs without tenzoo, on the CPU.

    The file is loaded again and run before it is given out, on the example and on batches of 1, 2 and 3: each of its
    outputs y' must agree with the model's y, ``max|y' − y| ≤ 1e-4 max|y|`` (8 roundings in half precision). Nothing is
    left behind if anything fails.

    Args:
        model: Stays as it is.
        path: What to write: a program of :mod:`torch.export` if it ends in ``.pt2``, an ONNX graph if in ``.onnx``,
            which holds at most 2 GB of weights.
        example_input: What the model is called with, in any of the forms of :mod:`~tenzoo.compression.reading`, and the
            program of a ``.pt2`` after it; the inputs of an ONNX graph are the tensors in it, in the order of the
            model's arguments. Its numbers are not in the file.
        factors: Keep the cores in the file, which is as small as they are. Layers with the implementation ``"auto"``
            do what is cheaper for large batches, embeddings compute the wanted rows alone; what is rebuilt in an ONNX
            file is so once, when onnxruntime loads it. By default the file has the dense weights that the cores stand
            for, as after :func:`~tenzoo.compression.fold_`.
        dynamic_batch: Whether the file takes batches of any size. That is the first size of the first input that has
            any, and of all inputs where it is the same. Otherwise the file takes inputs of the example's sizes only.

    Raises:
        TypeError: If the example holds something other than tensors and None.
        ValueError: If the path ends in something else, torch cannot follow the model, the model's batch size is fixed,
            its weights do not fit into an ONNX file, or the outputs of the file are not the model's.
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
    write, load = _target(path)
    check_module(model)
    example = _checked(read_call(example_input, "example_input", model), model)
    size = example.first_size if dynamic_batch else 0
    copied = _copied(model)
    with torch.no_grad():
        first = example.run(copied, "example_input")
        trials = [(example, first)]
        if size:
            sized = [_of_size(example, size, number) for number in (1, 2, 3)]
            with _refusing("expected a model that takes any batch size in `model`, unless dynamic_batch=False"):
                trials += [(inputs, inputs.on(copied)) for inputs in sized]
        made = _settled(copied) if factors else _folded(copied)
        program = _program(made, example, size)
        _check_free(path)
        with atomic_write(path) as file:
            write(program, file, [_varies(x, size) for x in example.tensors], _names(first))
            with _refusing("expected a file that runs as the model does", {str(file): path.name}), _quiet():
                loaded = load(file)
                found = [loaded(inputs) for inputs, _ in trials]
            for actual, (_, expected) in zip(found, trials, strict=True):
                _compare(actual, tensors_in(expected))
            _check_free(path)


# --- arguments -----------------------------------------------------------------------------------------------------


def _target(path: Path) -> tuple[Callable[..., None], Callable[[Path], Runner]]:
    targets = {".onnx": (_write_onnx, _load_onnx), ".pt2": (_write_program, _load_program)}
    if path.suffix not in targets:
        raise ValueError(f"expected a file that ends in one of {sorted(targets)} in `path`, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a file in an existing folder in `path`, got {str(path)!r}")
    _check_free(path)
    if path.suffix == ".onnx":
        for name in ("onnx", "onnxruntime", "onnxscript"):
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise ImportError(
                    f"expected the package {name} for {path.name!r}, got none; run pip install 'tenzoo[export]'"
                ) from error
    return targets[path.suffix]


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


def _varies(x: Tensor, size: int) -> bool:
    """Whether the first size of an input is the batch size; 0 is none."""
    return size > 0 and x.ndim > 0 and len(x) == size


def _of_size(example: Call, size: int, wanted: int) -> Call:
    """The samples of an example of one size, repeated or cut to another."""
    return example.map(lambda x: x[torch.arange(wanted) % len(x)] if _varies(x, size) else x)


def _copied(model: nn.Module) -> nn.Module:
    """In evaluation mode, on the CPU, and without what was compiled for another place."""
    model = getattr(model, "_orig_mod", model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"expected numbers in `model`, got {name!r} on the meta device")
    with _refusing("expected a model that can be copied in `model`"):
        return copy.deepcopy(model).cpu().eval()


# --- programs ------------------------------------------------------------------------------------------------------


def _folded(model: nn.Module) -> nn.Module:
    return model.to_dense() if isinstance(model, TensorizedLayer) else fold_(model)


def _settled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        # By a very large batch, a table would be rebuilt in every call, or be whole in memory all the time.
        if isinstance(module, TensorizedEmbedding) and module.implementation == "auto":
            module.implementation = "contract"
    return model


def _program(model: nn.Module, example: Call, size: int) -> torch.export.ExportedProgram:
    traced = _of_size(example, size, max(2, size))  # a size of 1 would be taken for a constant
    any_size = ", for any batch size unless dynamic_batch=False," if size else ""
    with _refusing(f"expected a model that torch.export can follow{any_size} in `model`"), _quiet():
        program = torch.export.export(
            model, traced.args, dict(traced.kwargs), dynamic_shapes=_shapes(model, example, size)
        )
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes:
            node.meta.pop("stack_trace", None)  # it has the names of files on this machine
    return program


def _shapes(model: nn.Module, example: Call, size: int) -> dict[str, Any]:
    """Which sizes are the batch's, by argument; what is taken as ``*args`` is one argument."""
    batch = torch.export.Dim("batch")
    given = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
    shapes: dict[str, Any] = pytree.tree_map(
        lambda x: {0: batch} if isinstance(x, Tensor) and _varies(x, size) else None, dict(given)
    )
    return shapes


def _write_program(program: torch.export.ExportedProgram, file: Path, batched: Sequence[bool], names: Any) -> None:
    with _quiet():
        torch.export.save(program, file)


def _load_program(file: Path) -> Runner:
    module = torch.export.load(file).module()
    return lambda call: tensors_in(call.on(module))


def _write_onnx(
    program: torch.export.ExportedProgram, file: Path, batched: Sequence[bool], names: Sequence[str]
) -> None:
    from onnxscript import optimizer

    weights = [x for x in (*program.state_dict.values(), *program.constants.values()) if isinstance(x, Tensor)]
    size = sum({x.data_ptr(): x.nbytes for x in weights}.values())
    if size > _LARGEST:
        raise ValueError(
            f"expected at most {_LARGEST:,} bytes of weights for an .onnx file in `model`, got {size:,}; write a .pt2"
        )
    # One name is enough for the axis that the inputs share.
    named = tuple({0: "batch"} if varies and not any(batched[:k]) else None for k, varies in enumerate(batched))
    with _refusing("expected a model that torch.onnx can write in `model`"), _quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            output_names=names,
            dynamic_shapes=named,
        )
        assert made is not None
        optimizer.optimize(made.model, output_size_limit=_SMALL)
        for node in made.model.graph:
            node.metadata_props.clear()
        made.save(file, external_data=False)


def _load_onnx(file: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def infer(call: Call) -> list[Tensor]:
        found = session.run(None, {name: x.numpy() for name, x in zip(names, call.tensors, strict=True)})
        return [torch.as_tensor(y) for y in found]

    return infer


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


# --- torch ---------------------------------------------------------------------------------------------------------


@contextmanager
def _refusing(expected: str, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Whatever goes wrong in another library becomes one line, with other names of files."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reasons = [line.removeprefix("- ").split(". ")[0] for line in lines if line.startswith("- ")]  # torch.export's
        text = ": ".join([type(error).__name__, *(reasons or lines)[:1]])
        for old, new in (names or {}).items():
            text = text.replace(old, new)
        raise ValueError(f"{expected}, got {text}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what exporters say of their own code; what the model's code warns of has been heard by then."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            warnings.filterwarnings("ignore", _OF_RECURRENT_LAYERS)
            yield
    finally:
        logger.setLevel(level)
