"""Fitting the cores of a compressed model to the outputs of the dense one, without labels."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call, hold_back
from tenzoo.compression.outputs import moved, output_error, outputs, relative, squares
from tenzoo.compression.progress import LOGGER
from tenzoo.compression.reading import Example, read_calls
from tenzoo.compression.replaceable import check_module
from tenzoo.compression.runs import counted, evaluating, repeatably
from tenzoo.compression.samples import divider, in_pieces
from tenzoo.cores import find_core_groups
from tenzoo.dynamics import is_distributed
from tenzoo.factorizations.decomposition import full_precision
from tenzoo.layers.tensorization import check_sizes

M = TypeVar("M", bound=nn.Module)

_STEP = 3e-3
"""Largest learning rate, relative to the root of the mean square of a core's numbers."""

_SHORTER = 0.3
"""Factor of the learning rate after a pass that made the outputs worse."""


@full_precision()
def refine_(model: M, dense: nn.Module, *, calibration: Example, epochs: int = 4) -> M:
    """Move the cores of a compressed model so that its outputs come closer to those of the dense model, in place.

    Minimizes ``‖y' − y‖²`` of all outputs over the cores alone, with Adam and one cosine from the largest learning rate
    to 0; that of a core is relative to the size of its numbers, so that it does not depend on how the cores share their
    norm. Both models run in evaluation mode, without dropout and with fixed statistics. A quarter of the samples is
    held back, if the model tells samples apart. The cores with the smallest error on them are kept, those from before
    included; after a pass that makes it larger, the next one goes on from the best cores in shorter steps. Frozen cores
    stay as they are.

    Args:
        model: The compressed model, such as :func:`~tenzoo.compression.apply_` returns it.
        dense: The model that was compressed, from before; it stays as it is.
        calibration: Inputs of the kind the model will see, without labels, in any of the forms of
            :mod:`~tenzoo.compression.reading`; of a ``DataLoader`` the first 128 samples are used. Those that the plan
            was made with will do; more are better. Padding counts as with :func:`~tenzoo.compression.plan`: not at all.
        epochs: Number of passes over the inputs. One takes as long as a pass of training.

    Returns:
        The model itself.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a model does not take the inputs, their outputs have other shapes, a number is out of range, or
            the model has no cores of single or double precision that may be trained.

    Example:
        >>> import copy
        >>> from tenzoo.compression import apply_, plan
        >>> _ = torch.manual_seed(0)
        >>> dense, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), torch.randn(256, 32)
        >>> model = apply_(copy.deepcopy(dense), plan(dense, factorization="tt", ranks=8))
        >>> before = (model(x) - dense(x)).norm().item()
        >>> (refine_(model, dense, calibration=x)(x) - dense(x)).norm().item() < before
        True
    """
    check_module(model)
    check_module(dense, "dense")
    check_sizes(epochs=epochs)
    if dense is model:
        raise ValueError(
            "expected the model from before it was compressed in `dense`, got `model` itself; copy it first"
        )
    cores = _cores(model)
    divide = divider(dense)
    fitted, held = hold_back(read_calls(calibration, "calibration", dense, divide), divide)
    pieces = [piece for call in fitted for piece in in_pieces(dense, call)]
    found = _fitted(model, dense, cores, pieces, held, epochs)
    _put(cores, found)
    return model


def _cores(model: nn.Module) -> list[nn.Parameter]:
    """The cores that may move."""
    cores = [core for group in find_core_groups(model) for core in group.cores if core.requires_grad]
    for core in cores:
        if is_distributed(core):
            raise ValueError("expected whole parameters in `model`, got cores that are sharded; refine it before")
        if core.is_meta:
            raise ValueError("expected numbers in `model`, got cores on the meta device")
        if core.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"expected cores in single or double precision in `model`, got {core.dtype}; call model.float() "
                "before, and convert it back after"
            )
    if not cores:
        raise ValueError("expected cores that may be trained in `model`, got none; compress it first, and freeze after")
    return cores


def _fitted(
    model: nn.Module,
    dense: nn.Module,
    cores: Sequence[nn.Parameter],
    pieces: Sequence[Call],
    held: Sequence[Call],
    epochs: int,
) -> list[Tensor]:
    """The numbers of the cores with the smallest error on the held calls."""
    with evaluating(dense):
        expected = outputs(dense, held)
        targets = [outputs(dense, [piece]) for piece in pieces]
    generator = torch.Generator().manual_seed(0)
    steps, step = epochs * len(pieces), _STEP
    with evaluating(model), _gradients_apart(cores):  # puts the numbers back
        optimizer = torch.optim.Adam([{"params": [core], "size": _size(core)} for core in cores])
        least = _first_error(outputs(model, held), expected)
        best = [core.detach().clone() for core in cores]
        LOGGER.info("error of the outputs on samples held back: %.4f", least)
        for epoch in range(epochs):
            order = torch.randperm(len(pieces), generator=generator).tolist()
            for done, k in enumerate(order, epoch * len(pieces)):
                for group in optimizer.param_groups:
                    group["lr"] = group["size"] * step * (1 + math.cos(math.pi * done / steps)) / 2
                _give_gradients(model, cores, pieces[k], targets[k])
                optimizer.step()
            error = output_error(model, (), held, expected)
            LOGGER.info("error of the outputs on samples held back, pass %d of %d: %.4f", epoch + 1, epochs, error)
            if error < least:
                least, best = error, [core.detach().clone() for core in cores]
            else:
                step *= _SHORTER
                _put(cores, best)
                optimizer.state.clear()
    return best


def _first_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The error of the outputs before the first pass, if the models have the same outputs."""
    shapes, others = ([tuple(y.shape) for y in each] for each in (found, expected))
    if shapes != others:
        raise ValueError(
            f"expected the model from before it was compressed in `dense`, got one with outputs of shapes {others} "
            f"where `model` has {shapes}"
        )
    return relative(moved(found, expected), expected)


def _put(cores: Sequence[nn.Parameter], numbers: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for core, own in zip(cores, numbers, strict=True):
            core.copy_(own)


def _size(core: Tensor) -> float:
    return float(core.detach().double().square().mean().sqrt())


def _give_gradients(model: nn.Module, cores: Sequence[nn.Parameter], call: Call, expected: Sequence[Tensor]) -> None:
    """Set the gradients of ``‖y' − y‖² / ‖y‖²`` for one call; infinity, as a mask leaves it, does not count."""
    with torch.enable_grad():
        found = counted(call, repeatably(model, call, "calibration"))
        steps = [(x - y)[y.isfinite()] for x, y in zip(found, expected, strict=True)]
        loss = torch.stack([step.double().square().sum() for step in steps]).sum() / (squares(expected) or 1.0)
    gradients: Sequence[Tensor | None] = [None] * len(cores)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, cores, allow_unused=True)
    for core, gradient in zip(cores, gradients, strict=True):
        core.grad = gradient


@contextmanager
def _gradients_apart(cores: Sequence[nn.Parameter]) -> Iterator[None]:
    """The gradients that the cores have are put back afterwards."""
    before = [core.grad for core in cores]
    try:
        yield
    finally:
        for core, gradient in zip(cores, before, strict=True):
            core.grad = gradient
