"""A tokenizer of words, and files of texts of many lengths."""

from pathlib import Path
from typing import Any

import numpy as np

from tenzoo.data import TextDataModule

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_tokenizer(**options: Any) -> Any:
    """Adds [CLS] and [SEP], and gives the second text of a pair type 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate([*SPECIAL, *WORDS, *"abcdefghijklmnopqrstuvwxyz.,!"])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    given = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **given | options)


def save_tokenizer(folder: Path, **options: Any) -> str:
    make_tokenizer(**options).save_pretrained(folder)
    return str(folder)


def random_texts(count: int, *, seed: int = 0, longest: int = 20) -> list[str]:
    """Texts of 1 to ``longest`` words."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, longest + 1))) for _ in range(count)]


def write_tsv(path: Path, columns: dict[str, list[Any]]) -> str:
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_small(folder: Path, *, count: int = 107, pad: str = "right") -> dict[str, str]:
    """The arguments of a data module: 107 texts of 3 classes, and 20 others to validate with."""
    folder.mkdir(exist_ok=True)
    train = {"sentence": random_texts(count), "label": [number * 7 % 3 for number in range(count)]}
    dev = {"sentence": random_texts(20, seed=1), "label": [number % 3 for number in range(20)]}
    return {
        "train": write_tsv(folder / "train.tsv", train),
        "validation": write_tsv(folder / "dev.tsv", dev),
        "tokenizer": save_tokenizer(folder / "tokenizer", padding_side=pad),
        "cache": str(folder / "cache"),
    }


def make(folder: Path, **options: Any) -> TextDataModule:
    return TextDataModule(**write_small(folder) | {"batch_size": 8} | options)
