"""The trained weights that come with the package."""

import hashlib
import json
from pathlib import Path

from tenzoo.tasks.pretrained import WEIGHTS

FOLDER = Path(__file__).parent / "weights"
"""It has a folder for each name, as ``save_pretrained`` writes it."""

SUMS = "SHA256.json"
"""In the folder of all weights: from a name to the digest of its file."""


def names() -> list[str]:
    """Of all weights; those of a config have its name, and others a dash and a word behind it."""
    return sorted(path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.rglob(WEIGHTS))


def of_model(model: str) -> list[str]:
    """The names of the weights of a model; its own is first.

    Example:
        >>> of_model("covid_tucker")
        ['covid_tucker']
    """
    return [name for name in names() if name.partition("-")[0] == model]


def folder_of(name: str) -> Path:
    """The folder of weights, as ``save_pretrained`` writes it.

    Raises:
        ValueError: If the zoo has none of this name, or the file is not the one that was published with it.
    """
    folder = FOLDER / name
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"expected a name of weights of the zoo, one of {', '.join(names())}, got {name!r}")
    expected = json.loads((FOLDER / SUMS).read_text(encoding="utf-8")).get(name)
    if digest(folder) != expected:
        raise ValueError(f"expected {str(folder / WEIGHTS)!r} as it was published, got another file; install again")
    return folder


def digest(folder: Path) -> str:
    """SHA-256 of the weights of a folder, in hexadecimal digits."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
