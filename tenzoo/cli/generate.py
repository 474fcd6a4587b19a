"""``tenzoo generate``: the continuation of a prompt by a trained language model."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tenzoo.cli.checkpoints import read_checkpoint
from tenzoo.data.corpus.vocabulary import Vocabulary, vocabulary_of
from tenzoo.models import Decoder
from tenzoo.models.generation import Continuation
from tenzoo.tasks import CausalLMTask


def generate_command(argv: Sequence[str]) -> int:
    """Print a prompt and its continuation, token by token."""
    try:
        arguments = _parser().parse_args(list(argv))
    except argparse.ArgumentError as error:
        raise ValueError(f"expected valid arguments for tenzoo generate, got: {error}") from error
    for name in ("ckpt_path", "prompt"):
        if getattr(arguments, name) is None:
            raise ValueError(f"expected `--{name}` for tenzoo generate, got none")
    names = [field.name for field in fields(Continuation)]
    continuation = Continuation(**{name: getattr(arguments, name) for name in names})
    model, vocabulary = _read(Path(arguments.ckpt_path))
    prompt = torch.from_numpy(vocabulary.encode(arguments.prompt, arg="prompt")).long()
    if not len(prompt):
        raise ValueError("expected a text of at least one token in `prompt`, got none")
    print(arguments.prompt, end="", flush=True)
    tokens = continuation.of(model, prompt[None])
    for text in vocabulary.continued(prompt.tolist(), (int(token) for token in tokens)):
        print(text, end="", flush=True)
    print()
    return 0


def _parser() -> argparse.ArgumentParser:
    purpose = "Continue a prompt with a language model that tenzoo fit has trained."
    parser = argparse.ArgumentParser(prog="tenzoo generate", description=purpose, exit_on_error=False)
    parser.add_argument("--ckpt_path", metavar="FILE", help="checkpoint of a CausalLMTask")
    parser.add_argument("--prompt", metavar="TEXT", help="text that is continued")
    default = Continuation()
    parser.add_argument(
        "--length", type=int, default=default.length, metavar="N", help="tokens to add, default: %(default)s"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=default.temperature,
        metavar="T",
        help="0 takes the most probable, default: %(default)s",
    )
    parser.add_argument("--top_k", type=int, metavar="K", help="draw from the K most probable tokens alone")
    parser.add_argument(
        "--top_p", type=float, default=default.top_p, metavar="P", help="draw from those that make up this probability"
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, metavar="N", help="of the random numbers, default: %(default)s"
    )
    return parser


def _read(path: Path) -> tuple[Decoder, Vocabulary]:
    """The network of a checkpoint, and the vocabulary of the data that it was trained on."""
    checkpoint = read_checkpoint(path)
    states = (checkpoint.get(name) for name in checkpoint if name.endswith("DataModule"))
    state: Any = next((state for state in states if isinstance(state, Mapping) and "vocabulary" in state), None)
    network = checkpoint.get("hyper_parameters", {}).get("network")
    if state is None or not isinstance(network, Mapping):
        raise ValueError(
            f"expected a checkpoint of a language model that tenzoo fit has trained in `ckpt_path`, got another: "
            f"{str(path)!r}"
        )
    task = CausalLMTask.load_from_checkpoint(path, weights_only=True, map_location="cpu")
    if not isinstance(task.network, Decoder):
        raise ValueError(
            f"expected a checkpoint of a Decoder in `ckpt_path`, got a {type(task.network).__name__}: {str(path)!r}"
        )
    return task.network, vocabulary_of(state["vocabulary"])
