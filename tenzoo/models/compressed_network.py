"""A compressed network, restored from the files of ``tenzoo compress``."""

from pathlib import Path
from typing import Any

from torch import nn

from tenzoo.compression import Plan, restore_
from tenzoo.weight_files import read_weights


class NotCompressedYetError(FileNotFoundError):
    """A file of a compressed network that ``tenzoo compress`` has not written yet."""


class CompressedNetwork(nn.Module):
    """A compressed network, restored from a dense network, its plan and its weights.

    With it, a network that was compressed by ``tenzoo compress`` or by :func:`~tenzoo.compression.apply_` is named in a
    YAML file and trained further like any other.

    Args:
        network: A network of the class and the sizes that were compressed; its numbers do not matter. In YAML it is a
            ``class_path`` with ``init_args``.
        plan: File of the plan.
        weights: File of the compressed network's weights.

    Raises:
        NotCompressedYetError: If a file is missing.
        ValueError: If a file is of another kind, or does not fit the network.

    Example:
        >>> import tempfile, torch
        >>> from tenzoo.compression import apply_, plan
        >>> folder = tempfile.mkdtemp()
        >>> dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> small = plan(dense, factorization="tt", ranks=8)
        >>> small.save(f"{folder}/plan.json")
        >>> torch.save(apply_(dense, small).state_dict(), f"{folder}/weights.pt")
        >>> other = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> network = CompressedNetwork(other, f"{folder}/plan.json", f"{folder}/weights.pt")
        >>> x = torch.randn(2, 64)
        >>> torch.equal(network(x), dense(x))
        True
    """

    def __init__(self, network: nn.Module, plan: str, weights: str) -> None:
        super().__init__()
        for argument, path in {"plan": plan, "weights": weights}.items():
            if not Path(path).is_file():
                raise NotCompressedYetError(
                    f"expected an existing file in `{argument}`, got {path!r}; tenzoo compress makes it"
                )
        self.network = restore_(network, Plan.load(plan), read_weights(weights))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the network."""
        return self.network(*args, **kwargs)
