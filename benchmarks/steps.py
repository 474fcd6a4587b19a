"""Steps of training that networks and single layers are timed by."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812

from benchmarks.loops import BareLoop, interleave

Step = Callable[[], object]


@contextlib.contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Compute on a number of threads, and on as many as before in the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_turns(steps: Mapping[str, Step], rounds: int, *, steps_per_turn: int = 1) -> dict[str, list[float]]:
    """Seconds of each step, one per round, after a turn that does not count."""
    loops = {name: BareLoop(step, steps=steps_per_turn, warmup=steps_per_turn) for name, step in steps.items()}
    return interleave(loops, rounds)


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.SGD:
    """The optimizer of the networks, few operations for all parameters: a loop over many small cores costs more."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, foreach=True)


def network_step(network: nn.Module, images: Tensor, labels: Tensor, *, autocast: bool = False) -> Step:
    """One step of SGD on the cross-entropy of a batch, in float32 or under autocast to bfloat16."""
    optimizer = sgd(network.parameters())

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def forward_step(network: nn.Module, images: Tensor) -> Step:
    """One pass in evaluation mode, without gradients."""
    network.eval()

    def step() -> None:
        with torch.no_grad():
            network(images)

    return step


def layer_step(layer: nn.Module, x: Tensor) -> Step:
    """Forward and backward, also with respect to an input of floats, as in the middle of a network."""
    with torch.no_grad():
        grad = torch.randn_like(layer(x))
    x = x.detach().requires_grad_(x.is_floating_point())

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(grad)

    return step


def saved_bytes(network: nn.Module, inputs: Sequence[Tensor]) -> int:
    """What a forward pass on images and labels saves for the backward pass, beside parameters, buffers and inputs."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers(), *inputs)}
    saved: list[Tensor] = []  # held here, no storage takes the address of another one

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    images, labels = inputs
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(network(images), labels)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    return sum(size for address, size in storages.items() if address not in known)
