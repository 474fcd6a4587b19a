"""The ascent step of Sharpness-Aware Minimization, as a context that restores the weights exactly."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tenzoo.dynamics.foreach import by_device_and_dtype
from tenzoo.dynamics.norms import inverse_grad_norm, squared_norms
from tenzoo.dynamics.shards import own_part, sharded_like

Rows = tuple[Tensor, ...] | None
"""The index of the rows of a sparse gradient; None for the whole parameter."""


@dataclass(frozen=True, eq=False)
class SharpnessState:
    """Gradient norms of SAM's ascent, for use after ``.grad`` holds the gradient at the perturbed point.

    Args:
        rho: Radius ρ of the perturbation.
        adaptive: Whether it is ASAM's. Theorem 3 holds for SAM only.
        parameters: The P parameters with a gradient.
        squared_grad_norms: ``γ = ‖g‖²`` of each at the unperturbed point, shape ``(P,)``.
        perturbed: The parameters that are moved, a part of ``parameters``.
        steering: ``uγ`` of each, shape ``(P,)``, to which Theorem 3's rate is proportional; None for one batch, whose
            other values give it.
    """

    rho: float
    adaptive: bool
    parameters: tuple[Tensor, ...]
    squared_grad_norms: Tensor
    perturbed: tuple[Tensor, ...]
    steering: Tensor | None = None
    _position: dict[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_position", {id(p): i for i, p in enumerate(self.parameters)})

    def squared_grad_norms_of(self, parameters: Iterable[Tensor]) -> Tensor | None:
        """γ of these parameters at the unperturbed point, shape ``(K,)``; None if one has no gradient."""
        return self._of(parameters, self.squared_grad_norms)

    def steering_of(self, parameters: Iterable[Tensor]) -> Tensor | None:
        """``uγ`` of these parameters, shape ``(K,)``; None if one has no gradient."""
        return self._of(parameters, self._all_steering())

    def _all_steering(self) -> Tensor:
        if self.steering is not None:
            return self.steering
        return self.squared_grad_norms * inverse_grad_norm(self.squared_grad_norms, self.grad_norm)

    def _of(self, parameters: Iterable[Tensor], values: Tensor) -> Tensor | None:
        positions = [self._position.get(id(p)) for p in parameters]
        known = [position for position in positions if position is not None]
        if len(known) != len(positions):
            return None
        # Views, because a list of positions would be copied to the device as an index.
        return torch.stack([values[position] for position in known])

    @property
    def grad_norm(self) -> Tensor:
        """‖g‖ over all perturbed parameters, a scalar: ``1/u``."""
        if len(self.perturbed) == len(self.parameters):
            return self.squared_grad_norms.sum().sqrt()
        gamma = self.squared_grad_norms_of(self.perturbed)
        assert gamma is not None
        return gamma.sum().sqrt()


class SharpnessWindow:
    """The ascents of all batches in one accumulation window, whose mean gradient the optimizer takes.

    Each batch has its own ascent. For the window, γ is that of the mean gradient, and ``uγ`` is the mean over the
    batches. A batch in which a parameter has no gradient counts as 0.

    Example:
        >>> w, window = torch.nn.Parameter(torch.tensor([3.0, 4.0])), SharpnessWindow()
        >>> for target in (0.0, 5.0):
        ...     w.grad = None
        ...     (w - target).square().sum().backward()
        ...     with sharpness_perturbation([w], rho=0.1) as state:
        ...         mean = window.add(state)
        >>> mean.squared_grad_norms, mean.steering_of([w])  # of the gradients (6, 8) and (-4, -2)
        (tensor([10.0000], dtype=torch.float64), tensor([7.2361], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self._batches = 0
        self._parameters: dict[int, Tensor] = {}
        self._perturbed: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self._steering: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, state: SharpnessState) -> SharpnessState:
        """The state of all batches so far. The gradients of the last one are still in ``.grad``."""
        self._batches += 1
        self._parameters.update((id(p), p) for p in state.parameters)
        self._perturbed.update((id(p), p) for p in state.perturbed)
        gradients = {id(p): _gradient(p) for p in state.parameters}
        steering = dict(zip(gradients, state._all_steering().unbind(), strict=True))
        again = [key for key in gradients if key in self._gradients]
        dense = [key for key in again if not gradients[key].is_sparse]
        for key in gradients.keys() - set(dense):
            self._gradients[key] = self._gradients[key] + gradients[key] if key in again else gradients[key].clone()
        _add_([own_part(self._gradients[key]) for key in dense], [own_part(gradients[key]) for key in dense])
        _add_([self._steering[key] for key in again], [steering[key] for key in again])
        self._steering = {**steering, **self._steering}
        return SharpnessState(
            state.rho,
            state.adaptive,
            tuple(self._parameters.values()),
            squared_norms([self._gradients[key] for key in self._parameters]) / self._batches**2,
            tuple(self._perturbed.values()),
            torch.stack([self._steering[key] for key in self._parameters]) / self._batches,
        )


def _add_(sums: list[Tensor], values: list[Tensor]) -> None:
    if sums:
        torch._foreach_add_(sums, values)


def _values(grad: Tensor) -> Tensor:
    return grad.values() if grad.is_sparse else grad


def _rows(grad: Tensor) -> Rows:
    return tuple(grad.indices()) if grad.is_sparse else None


class _Moved(NamedTuple):
    """Parameters that move together, and their values before."""

    parameters: list[Tensor]
    rows: Rows
    old: list[Tensor]


@torch.no_grad()
def _perturb_(
    parameters: Sequence[Tensor], grads: Sequence[Tensor], scale: Tensor, adaptive: bool, undo: list[_Moved]
) -> None:
    """Add ``scale·g`` (ASAM: ``scale·|w|²·g``) to each parameter, in few kernels. Append the old values to ``undo``."""
    parts = [own_part(parameter).detach() for parameter in parameters]
    for moved, gradients in by_device_and_dtype(parts, [own_part(grad) for grad in grads]):
        rows = _rows(gradients[0])
        if rows is None:
            old = [torch.empty_like(parameter) for parameter in moved]
            torch._foreach_copy_(old, moved)
        else:
            old = [moved[0][rows]]
        steps = list(torch._foreach_mul([_values(grad) for grad in gradients], scale.to(gradients[0])))
        if adaptive:
            sizes = [value.abs() for value in old] if old[0].is_complex() else old
            torch._foreach_mul_(steps, torch._foreach_mul(sizes, sizes))
        undo.append(_Moved(moved, rows, old))
        if rows is None:
            torch._foreach_add_(moved, steps)
        else:
            moved[0].index_put_(rows, old[0] + steps[0])


@torch.no_grad()
def _restore_(undo: Sequence[_Moved]) -> None:
    for moved, rows, old in reversed(undo):  # of parameters that share memory, the first has the old values
        if rows is None:
            torch._foreach_copy_(moved, old)
        else:
            moved[0].index_put_(rows, old[0])


def _scaled_norm(parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """ASAM's ``‖ |w|·g ‖``, a scalar."""
    pairs = zip(parameters, grads, strict=True)
    return squared_norms([_values(g) * (p[tuple(g.indices())] if g.is_sparse else p) for p, g in pairs]).sum().sqrt()


@contextmanager
def sharpness_perturbation(
    parameters: Iterable[Tensor],
    *,
    rho: float,
    adaptive: bool = False,
    perturbed: Iterable[Tensor] | None = None,
) -> Iterator[SharpnessState]:
    """Move the parameters to SAM's worst neighbor for the body of the ``with``, then restore them bit for bit.

    SAM (Foret et al., 2021, arXiv:2010.01412, eq. 2) moves to ``w + ρ g/‖g‖``, ‖g‖ over all perturbed parameters. ASAM
    (Kwon et al., 2021, arXiv:2102.11600) measures the neighborhood relative to ``|w|``: ``w + ρ |w|²g/‖ |w|·g ‖``. The
    gradients are read from ``.grad`` and do not change. Parameters without one do not move. With a sparse gradient only
    its rows move, and each process moves its part of sharded parameters. A zero gradient moves nothing. The weights are
    restored also if the body raises, and nothing waits for the device.

    Args:
        parameters: The parameters whose gradients the state reports.
        rho: Radius ρ ≥ 0.
        adaptive: Use ASAM's perturbation.
        perturbed: The parameters to move, if only a part of ``parameters``.

    Yields:
        A :class:`SharpnessState`.

    Raises:
        ValueError: If ``rho`` is negative or not finite, or no perturbed parameter has a gradient.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.square().sum().backward()
        >>> with sharpness_perturbation([w], rho=5.0) as state:
        ...     print(w.data, state.grad_norm)
        tensor([6., 8.]) tensor(10., dtype=torch.float64)
        >>> w.data
        tensor([3., 4.])
    """
    if not 0 <= rho < float("inf"):
        raise ValueError(f"expected a finite number >= 0 in `rho`, got {rho}")
    everything = {id(p): p for p in parameters if p.grad is not None}
    wanted = everything if perturbed is None else {id(p): p for p in perturbed if p.grad is not None}
    if not wanted:
        raise ValueError("expected gradients in `parameters`, got none; call backward() before the perturbation")
    everything = {**everything, **wanted}
    grads = {key: _gradient(p) for key, p in everything.items()}
    moved, moved_grads = list(wanted.values()), [grads[key] for key in wanted]
    with torch.no_grad():
        gamma = squared_norms(list(grads.values()))
        state = SharpnessState(rho, adaptive, tuple(everything.values()), gamma, tuple(moved))
        norm = _scaled_norm(moved, moved_grads) if adaptive else state.grad_norm
        scale = torch.where(norm == 0, 0.0, rho / norm)
    undo: list[_Moved] = []
    try:
        _perturb_(moved, moved_grads, scale, adaptive, undo)
        del grads, moved_grads  # so that the body can free them
        yield state
    finally:
        _restore_(undo)


def _gradient(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    assert grad is not None
    return grad.coalesce() if grad.is_sparse else sharded_like(grad.detach(), parameter)
