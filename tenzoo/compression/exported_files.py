"""Files of exported programs: PyTorch's ``.pt2`` and ONNX, written and loaded."""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from tenzoo.compression.calls import Call, tensors_in

Runner: TypeAlias = Callable[[Call], list[Tensor]]
"""A loaded file."""

_LARGEST = 2_000_000_000
"""Bytes of weights that a single ONNX file can hold."""

_SMALL = 64
"""Elements of a constant that ONNX's optimizer may compute from others: shapes, but no weights."""

_OF_RECURRENT_LAYERS = r"The tensor attributes? (self\.[\w.]*_flat_weights\[\d+\],? )+w\w+ assigned during export"
"""A warning about a list that torch's own layers keep."""


@dataclass(frozen=True)
class FileFormat:
    """How a program is written to a file, and loaded from it.

    Args:
        write: Takes the program, the file, the names of the sizes of each input that may change, and the names of the
            outputs.
        load: Takes the file.
    """

    write: Callable[[torch.export.ExportedProgram, Path, Sequence[Mapping[int, str]], Sequence[str]], None]
    load: Callable[[Path], Runner]


def file_format(path: Path) -> FileFormat:
    """The format of a file, by the end of its name.

    Raises:
        ValueError: If the name ends in something else.
        ImportError: If a package for the format is missing.
    """
    formats = {".onnx": FileFormat(_write_onnx, _load_onnx), ".pt2": FileFormat(_write_program, _load_program)}
    if path.suffix not in formats:
        raise ValueError(f"expected a file that ends in one of {sorted(formats)} in `path`, got {str(path)!r}")
    if path.suffix == ".onnx":
        for name in ("onnx", "onnxruntime", "onnxscript"):
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise ImportError(
                    f"expected the package {name} for {path.name!r}, got none; run pip install 'tenzoo[export]'"
                ) from error
    return formats[path.suffix]


def _write_program(
    program: torch.export.ExportedProgram, file: Path, axes: Sequence[Mapping[int, str]], names: Sequence[str]
) -> None:
    with quiet():
        torch.export.save(program, file)


def _load_program(file: Path) -> Runner:
    module = torch.export.load(file).module()
    return lambda call: tensors_in(call.on(module))


def _write_onnx(
    program: torch.export.ExportedProgram, file: Path, axes: Sequence[Mapping[int, str]], names: Sequence[str]
) -> None:
    from onnxscript import optimizer

    weights = [x for x in (*program.state_dict.values(), *program.constants.values()) if isinstance(x, Tensor)]
    size = sum({x.data_ptr(): x.nbytes for x in weights}.values())
    if size > _LARGEST:
        raise ValueError(
            f"expected at most {_LARGEST:,} bytes of weights for an .onnx file in `model`, got {size:,}; write a .pt2"
        )
    # A name once is enough for an axis that inputs share.
    named = tuple(
        {dim: name for dim, name in own.items() if not any(name in before.values() for before in axes[:k])} or None
        for k, own in enumerate(axes)
    )
    with refusing("expected a model that torch.onnx can write in `model`"), quiet():
        graph = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            output_names=names,
            dynamic_shapes=named,
        )
        assert graph is not None
        optimizer.optimize(graph.model, output_size_limit=_SMALL)
        for node in graph.model.graph:
            node.metadata_props.clear()
        graph.save(file, external_data=False)


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


@contextmanager
def refusing(expected: str, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn errors of other libraries into one line, with other names of files."""
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
def quiet() -> Iterator[None]:
    """Silence the warnings of exporters about their own code; those of the model's code came in the run before."""
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
