"""``tenzoo list``, ``describe``, ``copy`` and ``init``: what the zoo holds, and the first files of a project."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tenzoo.atomic import atomic_write
from tenzoo.cli.arguments import parsed, parser_of
from tenzoo.cli.messages import Answer, answer
from tenzoo.cli.run_folders import RUNS, checkpoint_of
from tenzoo.cli.tables import print_layers, print_models, print_parts
from tenzoo.tasks import Task
from tenzoo.zoo import catalog
from tenzoo.zoo.cards import card
from tenzoo.zoo.description import describe
from tenzoo.zoo.models import ModelInfo, info_of
from tenzoo.zoo.reading import read
from tenzoo.zoo.results import Results, read_results

_JSON: dict[str, Any] = {"action": "store_true", "help": "print JSON in place of a table"}


def describe_command(argv: Sequence[str]) -> int:
    """Print the layers of the model of a config."""
    parser = parser_of("describe", "Show the layers of a model; --config and overrides are those of tenzoo fit.")
    parser.add_argument("--json", **_JSON)
    chosen, rest = parser.parse_known_args(list(argv))
    task, data = read(catalog.with_paths(rest))
    inputs = task.example_input(data)
    network = task.described_network(data)
    layers = describe(network, inputs)
    if any(layer.multiplications is None for layer in layers):
        model, source = type(task).__name__, type(data).__name__
        said = f"multiplications are not counted: {model}.example_input() gives none for {source}"
        print(f"tenzoo: {said}", file=sys.stderr)
    print_layers(layers, None if inputs is None else len(inputs), as_json=chosen.json)
    parameters = list(network.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if trained < (number := sum(parameter.numel() for parameter in parameters)) and not chosen.json:
        print(f"trained: {trained:,} of {number:,} parameters; the others are frozen")
    return 0


def list_command(argv: Sequence[str]) -> int:
    """Print the models of the zoo, and on stderr what cannot be read, which makes the exit code that of an error."""
    parser = parser_of("list", "Show the models of the zoo: size, published and measured results.")
    parser.add_argument("--json", **_JSON)
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="such as 'tr_*' or 'methods/*'")
    parser.add_argument(
        "--configs", type=Path, metavar="DIR", help="show this folder; default: the zoo, and the folder configs here"
    )
    chosen, rest = parser.parse_known_args(list(argv))
    if rest:
        raise ValueError(f"expected only a pattern, --configs and --json for tenzoo list, got {' '.join(rest)}")
    folder: Path | None = chosen.configs
    if folder is not None and not folder.is_dir():
        raise ValueError(f"expected a folder of configs in `--configs`, got {str(folder)!r}")
    folders = [folder] if folder is not None else [catalog.folder(), *_own()]
    models: list[ModelInfo] = []
    refused: list[Answer] = []
    for name, path, results in _configs(folders, chosen.pattern):
        try:
            models.append(info_of(name, path, results))
        except Exception as error:  # the other models are shown
            said = answer(error)
            if said is None:
                raise
            named = said.line if str(path) in said.line else f"{said.line} (in {str(path)!r})"
            refused.append(Answer(named, said.code))
    parts = [] if folder is not None else [name for name in catalog.names(chosen.pattern) if catalog.is_part(name)]
    if chosen.pattern != "*" and not models and not refused and not parts:
        raise ValueError(f"expected a pattern of names in `PATTERN`, got {chosen.pattern!r}, which none matches")
    print_models(models, as_json=chosen.json)
    if parts and not chosen.json:
        print_parts(parts)
    for said in refused:
        print(said.line, file=sys.stderr)
    return max((said.code for said in refused), default=0)


def copy_command(argv: Sequence[str]) -> int:
    """Write a config of the zoo to a file of one's own."""
    parser = parser_of("copy", "Write a config of the zoo to a file that you can edit.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="such as covid_tucker or methods/das")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="DIR", help="default: this folder")
    chosen = parsed(parser, argv)
    if chosen.name is None:
        raise ValueError("expected `NAME` of a config for tenzoo copy, got none; tenzoo list shows them")
    source = catalog.find(chosen.name)
    target: Path = chosen.folder / source.name
    if target.exists():
        raise ValueError(f"expected a folder without {source.name} in `DIR`, got {str(chosen.folder)!r} with one")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as unfinished:
        unfinished.write_bytes(source.read_bytes())
    print(f"Written: {target}. Train it: tenzoo fit --config {target}")
    return 0


def init_command(argv: Sequence[str]) -> int:
    """Write a project of one's own: a network with tensorized layers, a task, data, a config and a test."""
    parser = parser_of("init", "Begin a project: a network with tensorized layers, a task, a config, a test.")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="a new folder, or an empty one")
    folder: Path | None = parsed(parser, argv).folder
    if folder is None:
        raise ValueError("expected a new folder in `DIR` for tenzoo init, got none")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"expected a new or empty folder in `DIR`, got {str(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted((Path(__file__).parent / "project").glob("*.txt")):
        with atomic_write(folder / source.stem) as unfinished:
            unfinished.write_bytes(source.read_bytes())
    print(f"Written: {folder}. Train its network: cd {folder} && tenzoo fit --config stripes.yaml")
    return 0


def save_command(argv: Sequence[str]) -> int:
    """Write the model of a checkpoint as a folder of safetensors, settings and a card."""
    purpose = "Write a trained model as a folder: weights in safetensors, settings, and a card made from its run."
    parser = parser_of("save", purpose)
    parser.add_argument("--ckpt_path", metavar="FILE", help="checkpoint of tenzoo fit; or best, or last")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--title", metavar="TEXT", help="of the card; default: the name of the folder")
    parser.add_argument("--half", action="store_true", help="write the weights in float16")
    chosen = parsed(parser, argv, required=("ckpt_path", "output"))
    source = Path(checkpoint_of(chosen.ckpt_path, RUNS))
    if not source.is_file():
        raise FileNotFoundError(f"expected an existing file in `ckpt_path`, got {str(source)!r}")
    task = Task.from_pretrained(source)
    text = card(source, chosen.title or chosen.output.name, task)
    task.save_pretrained(chosen.output, card=text, dtype=torch.float16 if chosen.half else None)
    print(f"Written: {chosen.output}. Judge it: tenzoo test --config CONFIG --pretrained {chosen.output}")
    return 0


def _own() -> list[Path]:
    """The folder ``configs`` of a project, unless it is the zoo's."""
    own = Path("configs")
    return [own] if own.is_dir() and own.resolve() != catalog.folder().resolve() else []


def _configs(folders: Sequence[Path], pattern: str) -> Iterator[tuple[str, Path, Results]]:
    for folder in folders:
        results = read_results(folder)
        for name in catalog.names(pattern, folder):
            if not catalog.is_part(name):
                yield name, folder / f"{name}.yaml", results.get(name, Results())
