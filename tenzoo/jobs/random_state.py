"""The state of all random numbers of a process, as tensors and builtins."""

import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the generators of Python, NumPy, torch, and a CUDA device.

    Args:
        device: The device of the process. Only a CUDA device has its own generator.

    Example:
        >>> state = random_state(torch.device("cpu"))
        >>> drawn = random.random(), np.random.rand(), torch.rand(1)
        >>> set_random_state(state, torch.device("cpu"))
        >>> drawn == (random.random(), np.random.rand(), torch.rand(1))
        True
    """
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 (other code may use it)
    assert isinstance(numpy, dict)
    return {
        "python": random.getstate(),
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore a state, except that of a device that this process does not have."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        ("MT19937", numpy["key"].numpy().astype(np.uint32), numpy["pos"], numpy["has_gauss"], numpy["gauss"])
    )
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
