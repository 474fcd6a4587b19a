"""Print tables: ``python -m benchmarks [name …]``, all of them without names.

``python -m benchmarks gpu [--device cpu]`` checks and measures on a GPU instead, see :mod:`benchmarks.gpu.run`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import lightning
import torch

from benchmarks.adapters import adapters
from benchmarks.compression import compression
from benchmarks.covid import covid
from benchmarks.decoders import decoders
from benchmarks.finetuning import finetuning
from benchmarks.formats import formats
from benchmarks.gpu import run as gpu
from benchmarks.layers import layers
from benchmarks.networks import networks
from benchmarks.reconstruct import tltorch
from benchmarks.report import Report
from benchmarks.sparse import sparse

COMPARISONS: dict[str, Callable[[int], Report]] = {
    "covid": covid,
    "sparse": sparse,
    "formats": formats,
    "tltorch": tltorch,
    "networks": networks,
    "layers": layers,
    "compression": compression,
    "adapters": adapters,
    "finetuning": finetuning,
    "decoders": decoders,
}
_LEAST_ROUNDS = 7


def main(args: Sequence[str] | None = None) -> None:
    """Run comparisons and print them as Markdown, or the checks on a GPU, one line each.

    Args:
        args: As on the command line, without the program's name; None takes ``sys.argv``.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios of times, measured in turns.")
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"of {', '.join(COMPARISONS)}; all without any. Or gpu, alone"
    )
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="rounds, at least 7 (default: 15)")
    parser.add_argument("--device", help="for gpu: cpu for a dry run; the card, if there is one, without")
    chosen = parser.parse_args(args)
    if chosen.names == ["gpu"]:
        try:
            wrong = gpu.main(chosen.device)
        except ValueError as error:
            parser.error(str(error))
        sys.exit(min(wrong, 1))
    if chosen.device is not None:
        parser.error(f"expected gpu alone beside --device, got {chosen.names}")
    if unknown := sorted(set(chosen.names) - set(COMPARISONS)):
        parser.error(f"expected names of {sorted(COMPARISONS)}, got {unknown}")
    if chosen.repeats < _LEAST_ROUNDS:
        parser.error(f"expected at least {_LEAST_ROUNDS} in --repeats, got {chosen.repeats}")
    torch.set_num_threads(1)
    threads = "one thread, two for networks, layers, compression and decoders"
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {threads}, variants in turns")
    for name in chosen.names or COMPARISONS:
        print(f"\n{COMPARISONS[name](chosen.repeats).markdown()}", flush=True)


if __name__ == "__main__":
    main()
