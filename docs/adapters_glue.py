"""Few-shot SST-2 and RTE with adapters of MiniLM: which optimizer suits which adapter.

    python docs/adapters_glue.py FOLDER_OF_GLUE FOLDER_OF_MODEL results.jsonl [--task SST-2]

512 sentences of each class are trained on. For each adapter and method the learning rate and the strength are those
with the best accuracy on 512 others of each class from the train split, with the first seed. Then three seeds are
judged by the published dev split. Each run is one line of the results, and a run that is there is not repeated: stop
and start the script as you like. At the end it prints the tables. One core; a run takes one to four minutes. Times of
steps are compared by ``python -m benchmarks adapters``, which runs them in turn.
"""

import argparse
import csv
import json
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.models import PretrainedTransformer
from tenzoo.tasks import SAM, TextClassificationTask

PER_CLASS, BATCH, SEEDS = 512, 16, (13, 21, 42)
STEPS = {"SST-2": 500, "RTE": 200}
TARGETS = {"target_modules": ["query", "value"], "r": 8}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {**TARGETS, "alpha": 16},
    "FLoRA": {**TARGETS, "kind": "flora", "alpha": 128},
    "LoRETTA-rep": {**TARGETS, "factorization": "tt", "rank": 5, "alpha": 16},
}
RATES = (1e-4, 3e-4, 5e-4)
STRENGTHS = {
    "LoRA": {"SAM": (0.001, 0.01, 0.1), "DAS": (0.1, 0.5, 0.7)},
    "FLoRA": {"SAM": (0.001, 0.01, 0.1), "DAS": (0.1, 0.5, 0.7)},
    "LoRETTA-rep": {"SAM": (0.05, 0.1, 0.2), "DAS": (0.5, 1.0, 2.0)},
}
COLUMNS = {"SST-2": ["sentence"], "RTE": ["sentence1", "sentence2"]}
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a file of GLUE, which quotes nothing."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def splits(folder: Path, task: str, seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """As many of each class for training and for the choice of settings, and the dev split."""
    rows = read(folder / task / "train.tsv")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = sorted({row["label"] for row in rows})
    by_class = [[rows[k] for k in order if rows[k]["label"] == label] for label in labels]
    train = [row for members in by_class for row in members[:PER_CLASS]]
    chosen_on = [row for members in by_class for row in members[PER_CLASS : 2 * PER_CLASS]]
    return train, chosen_on, read(folder / task / "dev.tsv")


class Batches:
    """Batches of rows of like length, in an order that follows from the seed."""

    def __init__(self, rows: list[Row], task: str, tokenizer: Any, labels: list[str], size: int) -> None:
        texts = [[row[column] for row in rows] for column in COLUMNS[task]]
        tokens = [len(each) for each in tokenizer(*texts, truncation=True, max_length=128)["input_ids"]]
        order = sorted(range(len(rows)), key=lambda k: tokens[k])
        self.batches: list[dict[str, Tensor]] = []
        for start in range(0, len(order), size):
            part = order[start : start + size]
            batch = tokenizer(
                *([text[k] for k in part] for text in texts),
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
            batch["labels"] = torch.tensor([labels.index(rows[k]["label"]) for k in part])
            self.batches.append(dict(batch))

    def shuffled(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """So many batches, all of them once before any comes again."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for k in torch.randperm(len(self.batches), generator=generator).tolist():
                if steps == 0:
                    return
                steps -= 1
                yield self.batches[k]


def run(arguments: argparse.Namespace, task: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Train once, and judge on both held-out splits."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    parts = splits(arguments.glue, task, setting["seed"])
    labels = sorted({row["label"] for row in parts[0]})
    train = Batches(parts[0], task, tokenizer, labels, BATCH)
    held_out = [DataLoader(Batches(part, task, tokenizer, labels, 64).batches, batch_size=None) for part in parts[1:]]
    lightning.seed_everything(setting["seed"], verbose=False)
    network = PretrainedTransformer(str(arguments.model), len(labels), adapter=ADAPTERS[setting["adapter"]])
    callbacks: list[Callback] = []
    if setting["method"] == "DAS":
        callbacks.append(DeviationAwareScaling(alpha=setting["strength"]))
    model = TextClassificationTask(
        network,
        num_classes=len(labels),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=setting["lr"], weight_decay=0.0),
        lr_scheduler="cosine",
        sam=SAM(rho=setting["strength"]) if setting["method"] == "SAM" else None,
    )
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = list(train.shuffled(setting["seed"], STEPS[task]))
    start = time.process_time()
    trainer.fit(model, DataLoader(batches, batch_size=None))
    seconds = time.process_time() - start
    names = ("chosen_on", "dev")
    found = {
        name: trainer.test(model, loader, verbose=False)[0]["test/accuracy"]
        for name, loader in zip(names, held_out, strict=True)
    }
    trained = sum(p.numel() for name, p in network.named_parameters() if "tensor_adapter_update" in name)
    return {"task": task, **setting, **found, "parameters": trained, "s_per_step": seconds / STEPS[task]}


def settings(adapter: str, method: str) -> list[dict[str, Any]]:
    """All learning rates and strengths."""
    strengths = (None,) if method == "AdamW" else STRENGTHS[adapter][method]
    return [
        {"adapter": adapter, "method": method, "lr": lr, "strength": strength} for lr in RATES for strength in strengths
    ]


class Results:
    """The lines of the file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        path = arguments.results
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def of(self, task: str, setting: dict[str, Any]) -> dict[str, Any]:
        """The result of a run, which is made if it is not there."""
        for row in self.rows:
            if all(row[key] == value for key, value in {"task": task, **setting}.items()):
                return row
        row = run(self.arguments, task, setting)
        with self.arguments.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row


def table(results: Results, task: str) -> None:
    """Print the best setting of each adapter and method, judged by the dev split."""
    print(f"\n{task}\n\n| adapter | parameters | method | lr | strength | chosen on | dev accuracy |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for adapter in ADAPTERS:
        for method in ("AdamW", "SAM", "DAS"):
            tried = [results.of(task, {**each, "seed": SEEDS[0]}) for each in settings(adapter, method)]
            best = max(tried, key=lambda row: row["chosen_on"])
            chosen = {key: best[key] for key in ("adapter", "method", "lr", "strength")}
            rows = [results.of(task, {**chosen, "seed": seed}) for seed in SEEDS]
            accuracies = [100 * row["dev"] for row in rows]
            print(
                f"| {adapter} | {best['parameters']:,} | {method} | {best['lr']:g} | {best['strength'] or ''} | "
                f"{100 * best['chosen_on']:.1f} | {mean(accuracies):.1f} ± {stdev(accuracies):.1f} |",
                flush=True,
            )


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("glue", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--task", choices=list(COLUMNS), action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = Results(arguments)
    for task in arguments.task or COLUMNS:
        table(results, task)


if __name__ == "__main__":
    main()
