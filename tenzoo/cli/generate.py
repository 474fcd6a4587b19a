"""``tenzoo generate``: the continuation of a prompt by a trained language model."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from tenzoo.cli.arguments import parsed, parser_of
from tenzoo.cli.run_folders import RUNS, checkpoint_of
from tenzoo.data.corpus.vocabulary import Vocabulary, vocabulary_of
from tenzoo.models import Decoder
from tenzoo.models.generation import Continuation
from tenzoo.tasks import CausalLMTask, Task


def generate_command(argv: Sequence[str]) -> int:
    """Print a prompt and its continuation, token by token."""
    arguments = parsed(_parser(), argv, required=("ckpt_path", "prompt"))
    names = [field.name for field in fields(Continuation)]
    continuation = Continuation(**{name: getattr(arguments, name) for name in names})
    model, vocabulary = _read(checkpoint_of(arguments.ckpt_path, RUNS))
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
    parser = parser_of("generate", purpose)
    parser.add_argument(
        "--ckpt_path", metavar="FILE", help="checkpoint of a CausalLMTask, or a folder of tenzoo save; or best, or last"
    )
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


def _read(source: str) -> tuple[Decoder, Vocabulary]:
    """The network of a checkpoint or a folder, and the vocabulary of the data that it was trained on."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"expected a checkpoint, or a folder of tenzoo save, in `ckpt_path`, got {source!r}")
    task = Task.from_pretrained(path)
    state = (task.trained_on or {}).get("vocabulary")
    if not isinstance(task, CausalLMTask) or state is None:
        what = "a checkpoint of a language model that tenzoo fit has trained"
        raise ValueError(f"expected {what} in `ckpt_path`, got another: {source!r}")
    if not isinstance(task.network, Decoder):
        kind = type(task.network).__name__
        raise ValueError(f"expected a checkpoint of a Decoder in `ckpt_path`, got a {kind}: {source!r}")
    return task.network, vocabulary_of(state)
