"""A compressed ResNet-18 against the dense one, and its planned layers against their estimates, in inference."""

import copy
import resource
import time
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.estimates import Case, agreement
from benchmarks.report import Ratio, Report, Table
from benchmarks.steps import Step, forward_step, in_turns, on_threads
from tenzoo.compression import Plan, apply_, fold_, plan

_BUDGET = 4_400_000
_NOTE = (
    "torchvision's ResNet-18 with random weights, as tensor trains of {parameters:,} of its {dense:,} parameters "
    "(arXiv:2508.10435: 4.4 M): planned in {planned:.1f} s and applied in {applied:.1f} s, with a peak of {memory:.2f} "
    "GB for the whole process. Passes in evaluation mode on images of {side} × {side}, channels_last, {threads} "
    "threads. {contracted} of {made} tensorized layers are contracted for a single image; the others keep their "
    "reconstructed weights between calls, and then cost what dense ones do."
)
CASES = tuple(
    Case(sizes, side, batch, name, 1 / 3)
    for sizes, side in (((64, 64), 56), ((128, 128), 28), ((256, 256), 14), ((512, 512), 7), ((512, 1000), 0))
    for batch in (1, 16)
    for name in ("tt", "tucker", "cp")
)


def compression(
    rounds: int,
    *,
    network: nn.Module | None = None,
    budget: int = _BUDGET,
    side: int = 224,
    batches: Sequence[int] = (1, 64),
    cases: Sequence[Case] = CASES,
    threads: int = 2,
) -> Report:
    """Time forward passes of a dense network, and of the same compressed and folded back.

    Args:
        rounds: How often each variant has its turn.
        network: To compress; None takes torchvision's ResNet-18.
        budget: Parameters of the compressed network.
        side: Of the images, in pixels.
        batches: Numbers of images.
        cases: Layers whose estimates are compared with measurements.
        threads: To compute on.
    """
    torch.manual_seed(0)
    dense = (torchvision.models.resnet18() if network is None else network).to(memory_format=torch.channels_last)
    with on_threads(threads):
        start = time.perf_counter()
        made = plan(dense, factorization="tt", budget=budget, example_input=torch.randn(1, 3, side, side))
        planned = time.perf_counter()
        small = apply_(copy.deepcopy(dense), made)
        applied = time.perf_counter()
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        networks = {"dense": dense, "compressed": small, "folded": fold_(copy.deepcopy(small))}
        steps: dict[str, Step] = {
            f"{name}, batch {batch}": forward_step(network, _images(batch, side))
            for batch in batches
            for name, network in networks.items()
        }
        times = in_turns(steps, rounds)
        tables = agreement(min(rounds, 7), cases, training=False)
    ratios = [
        Ratio.of(times, f"{name}, batch {batch}", f"dense, batch {batch}", target=1.0 if name == "compressed" else None)
        for batch in batches
        for name in ("compressed", "folded")
    ]
    note = _NOTE.format(
        parameters=made.parameters,
        dense=made.dense_parameters,
        planned=planned - start,
        applied=applied - planned,
        memory=memory / 1e9,
        side=side,
        threads=threads,
        contracted=sum(_contracted(made)),
        made=len(_contracted(made)),
    )
    return Report("compression: ResNet-18 in inference", note, ("ms/pass", 1e3), times, ratios, [_cost(made), *tables])


def _images(batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)


def _contracted(made: Plan) -> list[bool]:
    return [layer.multiplications != layer.dense_multiplications for layer in made.layers if layer.rank is not None]


def _cost(made: Plan) -> Table:
    rows = [
        ["parameters", f"{made.dense_parameters:,}", f"{made.parameters:,}"],
        ["multiplications for an image", f"{made.dense_multiplications or 0:,}", f"{made.multiplications or 0:,}"],
    ]
    return ("cost", "dense", "compressed"), rows
