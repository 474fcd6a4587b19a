"""The models of the zoo in Python: what there is, and one of them by its name."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tenzoo.causes import chain
from tenzoo.models import CompressedNetwork
from tenzoo.models.compressed_network import NotCompressedYetError
from tenzoo.models.pretrained_transformer import NoPretrainedModelError, NoTextPackagesError
from tenzoo.tasks import Task
from tenzoo.zoo import catalog, weights
from tenzoo.zoo.description import describe, totals
from tenzoo.zoo.reading import read
from tenzoo.zoo.results import Result, Results, read_results
from tenzoo.zoo.yaml_files import read_config


@dataclass(frozen=True)
class ModelInfo:
    """A model of the zoo.

    Args:
        name: Of the config in the zoo, or in a folder of one's own.
        config: Path of the config.
        model: What is trained, and in which format; how to make it first, if that is missing.
        data: On what.
        parameters: Their number; None of a network that is not made yet.
        compression: Dense parameters per parameter; likewise.
        published: Results of others.
        measured: Results of this config, with their commands.
        weights: Names of the trained weights that come with the package.
    """

    name: str
    config: str
    model: str
    data: str
    parameters: int | None
    compression: float | None
    published: tuple[Result, ...]
    measured: tuple[Result, ...]
    weights: tuple[str, ...] = ()


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """The names of the models.

    Args:
        pattern: Of the shell, such as ``"tr_*"``.
        pretrained: Whether only those are listed that have trained weights in the package.

    Example:
        >>> list_models("t*_resnet20_cifar10")
        ['tr_resnet20_cifar10', 'tt_resnet20_cifar10', 'tucker_resnet20_cifar10']
    """
    found = [name for name in catalog.names(pattern) if not catalog.is_part(name)]
    return [name for name in found if weights.of_model(name)] if pretrained else found


def model_info(name: str) -> ModelInfo:
    """Size and results of a model; it is made, and not trained.

    Raises:
        ValueError: If there is no model of this name.

    Example:
        >>> info = model_info("tr_resnet20_cifar10")
        >>> info.parameters, round(info.compression, 1), info.measured[0].value
        (55826, 4.8, 0.8573)
    """
    path = _model(name)
    bare = name.removeprefix(catalog.PREFIX)
    return info_of(bare, path, read_results(catalog.folder()).get(bare, Results()))


def load_task(name: str, pretrained: bool | str = False) -> Task:
    """The task that trains a model, with the network and the optimizer of its config.

    Args:
        name: Such as ``"covid_tucker"``.
        pretrained: As in :func:`create_model`.

    Raises:
        ValueError: If there is no model, or there are no weights, of this name.
    """
    return _loaded(name, pretrained, {})[0]


def create_model(name: str, pretrained: bool | str = False, **overrides: Any) -> nn.Module:
    """The network of a model, in training mode.

    Args:
        name: Such as ``"tr_resnet20_cifar10"``.
        pretrained: Whether it has the trained weights of its name that come with the package, or the name of others of
            its weights; else they are drawn at random.
        **overrides: Other values for arguments of the network; those of a completion are its task's.

    Raises:
        ValueError: If there is no model, or there are no weights, of this name, or they do not fit the overrides.

    Example:
        >>> network = create_model("tr_resnet20_cifar10", rank=5)
        >>> sum(parameter.numel() for parameter in network.parameters())
        15476
    """
    task, data = _loaded(name, pretrained, overrides)
    return task.described_network(data)


def info_of(name: str, path: Path, results: Results) -> ModelInfo:
    """What is known of a config; where its network cannot be made yet, the model says why."""
    trained = tuple(weights.of_model(name)) if catalog.folder() in path.parents else ()
    try:
        with _offline():
            task, data = read(["--config", str(path)])
    except Exception as error:
        for cause in chain(error):
            for kind, instead in _NOT_THERE.items():
                if isinstance(cause, kind):
                    return ModelInfo(
                        name, str(path), instead, "", None, None, results.published, results.measured, trained
                    )
        raise
    network = task.described_network(data)
    layers = describe(network)
    formats = sorted({layer.factorization for layer in layers if layer.factorization is not None})
    if isinstance(network, CompressedNetwork):
        network = network.network
    title = f"{type(network).__name__}-{getattr(network, 'depth', '')}".rstrip("-")
    trained_on = data.hparams.get("dataset") or type(data).__name__.removesuffix("DataModule")
    number, dense = totals(layers)
    model = " ".join([*formats, title])
    shown = (name, str(path), model, trained_on, number, dense / number, results.published, results.measured)
    return ModelInfo(*shown, trained)


def _model(name: str) -> Path:
    path = catalog.find(name)
    if catalog.is_part(name.removeprefix(catalog.PREFIX)):
        raise ValueError(f"expected a model of the zoo, got {name!r}, a config that is composed over one")
    return path


def _loaded(name: str, pretrained: bool | str, overrides: dict[str, Any]) -> tuple[Task, Any]:
    task, data = _read(name, overrides)
    if pretrained is not False:
        bare = name.removeprefix(catalog.PREFIX)
        chosen = bare if pretrained is True else pretrained
        if (known := weights.of_model(bare)) and chosen not in known:
            raise ValueError(f"expected True or one of {', '.join(known)} in `pretrained` for {name!r}, got {chosen!r}")
        task.described_network(data)  # builds it
        task.load_pretrained(weights.folder_of(chosen))
    return task, data


def _read(name: str, overrides: dict[str, Any]) -> tuple[Task, Any]:
    path = _model(name)
    arguments = read_config(path)["model"]["init_args"]
    where = "model.init_args.network.init_args" if "network" in arguments else "model.init_args"
    words = [f"--{where}.{key}={json.dumps(value)}" for key, value in overrides.items()]
    return read(["--config", str(path), *words])


@contextmanager
def _offline() -> Iterator[None]:
    """Without the hub: a list fetches no models."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


_NOT_THERE: dict[type[Exception], str] = {
    NotCompressedYetError: "(made by tenzoo compress)",
    NoPretrainedModelError: "(weights not there)",
    NoTextPackagesError: "(needs pip install tenzoo[text])",
}
"""What is shown for models that cannot be made yet."""
