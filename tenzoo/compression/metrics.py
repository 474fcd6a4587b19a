"""The metrics in which the change of a layer's weight is, approximately, the change of the model's outputs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from tenzoo.compression.calls import Call
from tenzoo.compression.inputs import watching
from tenzoo.compression.progress import LOGGER, each
from tenzoo.compression.runs import counted, evaluating, repeatably
from tenzoo.compression.samples import in_pieces
from tenzoo.factorizations.decomposition import scaled_to_safety
from tenzoo.layers import TensorizedLayer

_RIDGE = 1e-3
"""Added to the second moments of each mode, whose mean is 1: what never varied may vary later."""

_UNSEEN = 0.5
"""Added to the weights of rows of a table, whose mean is 1: a row that was never looked up may be later."""

_DRAWN = 512
"""Least number of samples times random v: with few samples each has several, which average out."""

_IMAGES = 8
"""Number of images whose patches are in memory at a time."""


def output_metrics(
    model: nn.Module, layers: Mapping[str, TensorizedLayer[Any]], calls: Sequence[Call]
) -> dict[str, dict[int, Tensor]]:
    """The metrics in which the change of a layer's weight is, approximately, the change of the model's outputs.

    Let x be the rows that the weight of a layer is multiplied by, such as patches, and J the derivatives of the model's
    outputs by the rows of the layer's output. A change D of the weight moves the outputs by ``E‖J D x‖²``, if the rows
    act independently. This is approximated, up to a factor, by ``‖G^{1/2} D C^{1/2}‖²`` with the moments

        C = E[g² x xᵀ],   G = E[x² g gᵀ],   g = Jᵀ v,

    of random signs v (Kronecker-factored curvature, Martens & Grosse 2015, arXiv:1503.05671, with each row weighted by
    its other side). C and G are approximated by Kronecker products of their parts for the single modes, and
    ``S_k = C_k^{1/2}`` is the metric of the mode k. The rows of an embedding are looked up: C is the diagonal of the
    sums of g² of each row. Where no gradient reaches the output of a layer, C is that of equal g, and the modes of the
    output have no metric.

    Args:
        model: A model that stays as it is; it runs in evaluation mode, forward and backward.
        layers: By the names of the model's layers, their tensorized counterparts.
        calls: Inputs from the argument ``calibration`` of the caller; more samples make better metrics.

    Returns:
        For each layer that was called, the matrices ``S_k`` of the modes of its weight's tensor, up to their scales; of
        the modes of a table's rows the diagonals.

    Raises:
        ValueError: If the model does not take the input.
    """
    pieces = [piece for call in calls for piece in in_pieces(model, call)]
    moments = {name: _Moments() for name in layers}
    generator = torch.Generator().manual_seed(0)
    draws = math.ceil(_DRAWN / max(sum(call.size for call in calls), 1))
    records: list[_Record] = []

    def probe(name: str, x: Tensor | None, output: Tensor) -> Tensor:
        zeros = torch.zeros_like(output, requires_grad=True)
        if x is not None:
            records.append(_Record(name, x.detach(), zeros))
        return output + zeros

    with evaluating(model), watching(model, layers, probe):
        for piece in each(pieces, f"measuring inputs and gradients of {len(layers)} layers"):
            outputs = _outputs_with_gradients(model, piece, records)
            found = list(records)  # a checkpoint calls layers again in the backward pass
            for draw in range(1, draws + 1):
                gradients = _gradients(outputs, [record.probe for record in found], generator, again=draw < draws)
                for record, gradient in zip(found, gradients, strict=True):
                    moments[record.name].add(layers[record.name], record.x, gradient)
    return {name: own.roots() for name, own in moments.items() if own.called}


def _outputs_with_gradients(model: nn.Module, piece: Call, records: list["_Record"]) -> list[Tensor]:
    """The outputs of a model; without gradients if it does not run with them, such as one that makes arrays."""
    records.clear()
    try:
        with torch.enable_grad():
            return counted(piece, repeatably(model, piece, "calibration"))
    except ValueError as error:
        records.clear()
        outputs = counted(piece, repeatably(model, piece, "calibration"))
        LOGGER.info("the outputs have no gradients: %s", error)
        return outputs


class _Record(NamedTuple):
    """One call of a layer: its input, and zeros that were added to its output."""

    name: str
    x: Tensor
    probe: Tensor


def _gradients(
    outputs: Sequence[Tensor], probes: Sequence[Tensor], generator: torch.Generator, *, again: bool
) -> Sequence[Tensor | None]:
    """``Jᵀ v`` for each probe; None where there is none."""
    drawn = [_signs(y, generator) for y in outputs]
    pairs = [(y, v) for y, v in zip(outputs, drawn, strict=True) if y.requires_grad]
    if not pairs or not probes:
        return [None] * len(probes)
    try:
        return torch.autograd.grad(
            [y for y, _ in pairs], probes, [v for _, v in pairs], retain_graph=again, allow_unused=True
        )
    except RuntimeError as error:
        LOGGER.warning("the outputs of the network on `calibration` have no gradients: %s", error)
        return [None] * len(probes)


def _signs(y: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers 1 and −1 at random, of the shape of a tensor."""
    return (2 * torch.randint(0, 2, y.shape, generator=generator) - 1).to(y)


@dataclass
class _Moment:
    """A sum of second moments, divided by ``4^exponent``."""

    total: Tensor
    exponent: int

    def add(self, total: Tensor, exponent: int) -> None:
        """Add another."""
        largest = max(exponent, self.exponent)
        self.total = self.total * 4.0 ** (self.exponent - largest) + total * 4.0 ** (exponent - largest)
        self.exponent = largest


@dataclass
class _Moments:
    """The second moments of one layer, by the modes of its tensor."""

    weighted: dict[int, _Moment] = field(default_factory=dict)
    plain: dict[int, _Moment] = field(default_factory=dict)
    called: bool = False

    def add(self, layer: TensorizedLayer[Any], x: Tensor, gradient: Tensor | None) -> None:
        """Add one call of the layer."""
        self.called = True
        if gradient is not None:
            gradient = gradient.nan_to_num(0, 0, 0)
            if not gradient.any() or layer.output_rows(gradient) is None:
                gradient = None
        moments = self.plain if gradient is None else self.weighted
        if (numbers := layer.look_ups(x)) is not None:
            parts = _of_look_ups(layer, numbers, x, gradient)
        else:
            parts = _of_patches(layer, x, gradient)
        for mode, rows, exponent in parts:
            total = (rows if rows.ndim == 1 else rows @ rows.t()).double()
            if mode in moments:
                moments[mode].add(total, exponent)
            else:
                moments[mode] = _Moment(total, exponent)

    def roots(self) -> dict[int, Tensor]:
        """The roots of the moments; of those without gradients only where there are no others."""
        return {mode: _root(moment.total) for mode, moment in (self.weighted or self.plain).items()}


_Part: TypeAlias = tuple[int, Tensor, int]
"""A mode, rows R and an exponent: the second moments are ``4^exponent R Rᵀ``, or diagonal, and R their numbers."""


def _of_look_ups(layer: TensorizedLayer[Any], numbers: Tensor, x: Tensor, gradient: Tensor | None) -> Iterator[_Part]:
    """The parts of a table, whose rows count by how often they are looked up, or by their gradients."""
    exponent = 0
    if gradient is not None:
        rows = layer.output_rows(gradient)
        assert rows is not None
        rows, exponent = _safe(rows)
        yield from _unfolded(rows, numbers.ndim, exponent)
        weighted = layer.look_ups(x, rows.flatten(1).double().square().sum(1))
        assert weighted is not None
        numbers = weighted
    for mode in range(numbers.ndim):
        yield mode, numbers.movedim(mode, 0).reshape(numbers.shape[mode], -1).sum(1), exponent


def _of_patches(layer: TensorizedLayer[Any], x: Tensor, gradient: Tensor | None) -> Iterator[_Part]:
    """The parts of a weight that is multiplied by patches: each row counts by the size of its gradient."""
    size = _IMAGES if x.ndim == 4 else max(len(x), 1)
    inputs = torch.split(x, size)
    gradients: Sequence[Tensor | None] = [gradient] * len(inputs)
    if gradient is not None and len(inputs) > 1:
        gradients = torch.split(gradient, size)
    for part, own in zip(inputs, gradients, strict=True):
        patches = layer.patches(part)
        if patches is None:
            return
        first = len(layer.factorization.shape) - (patches.ndim - 1)
        patches, exponent = _safe(patches)
        if own is None:
            yield from _unfolded(patches, first, exponent)
            continue
        rows = layer.output_rows(own)
        assert rows is not None
        rows, more = _safe(rows)
        for these, others, place in ((patches, rows, first), (rows, patches, 0)):
            weights = torch.linalg.vector_norm(others.flatten(1), dim=1)
            weighted, extra = _safe(these * weights.view(-1, *(1,) * (these.ndim - 1)))
            yield from _unfolded(weighted, place, exponent + more + extra)


def _unfolded(rows: Tensor, first: int, exponent: int) -> Iterator[_Part]:
    """The unfoldings of rows ``(n, *modes)``, of which this mode of the weight's tensor is the first."""
    for k in range(1, rows.ndim):
        yield first + k - 1, rows.movedim(k, 0).flatten(1), exponent


def _safe(rows: Tensor) -> tuple[Tensor, int]:
    """Rows whose squares neither overflow nor vanish, and their exponent."""
    return scaled_to_safety(rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows)


def _root(moment: Tensor) -> Tensor:
    mean = (moment if moment.ndim == 1 else moment.diagonal()).mean()
    moment = moment / mean if mean > 0 else moment
    if moment.ndim == 1:
        return (moment + _UNSEEN).sqrt()
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = (vectors * (values.clamp_(min=0) + _RIDGE).sqrt()) @ vectors.t()
    return root
