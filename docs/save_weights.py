"""Put the weights of a run into the package, with a card, and note their digest.

    python docs/save_weights.py NAME CHECKPOINT [--half]

NAME is that of a config of the zoo, perhaps with a dash and a word behind it: tr_resnet20_cifar10-noise_das. The folder
of the run has its config, metrics and environment, from which the card is made.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from tenzoo.tasks import Task
from tenzoo.zoo import weights
from tenzoo.zoo.cards import card


def main() -> None:
    """Write the folder, in place of one that is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--half", action="store_true")
    given = parser.parse_args()
    folder = weights.FOLDER / given.name
    shutil.rmtree(folder, ignore_errors=True)
    task = Task.from_pretrained(given.checkpoint)
    text = card(given.checkpoint, given.name, task)
    task.save_pretrained(folder, card=text, dtype=torch.float16 if given.half else None)
    sums = weights.FOLDER / weights.SUMS
    known = json.loads(sums.read_text(encoding="utf-8")) if sums.is_file() else {}
    known[given.name] = weights.digest(folder)
    sums.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
