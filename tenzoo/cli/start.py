"""Weights that a run starts from, or that are judged, without being the checkpoint of a run that goes on."""

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from tenzoo.tasks import Task
from tenzoo.tasks.pretrained import fingerprint
from tenzoo.zoo import catalog, weights

ZOO = "zoo"
"""In place of a folder: the weights of the zoo for the config."""


_MEANING = ("vocabulary", "labels", "class_names")
"""What data notes of the meaning of its numbers."""


class StartWeights(Callback):
    """Loads weights when the model is built, before the first step.

    Args:
        source: A folder of ``save_pretrained``, a name on the hub, or a checkpoint.
    """

    def __init__(self, source: Path | str) -> None:
        self.source = source

    def _load(self, trainer: Trainer, task: LightningModule) -> None:
        assert isinstance(task, Task)
        task.load_pretrained(self.source)
        rank_zero_info(f"weights of {self.source}")
        data = trainer.datamodule  # type: ignore[attr-defined]
        if task.trained_on is None or data is None:
            return
        now, then = fingerprint(data.state_dict()), task.trained_on
        for name in _MEANING:
            if name in then and now.get(name) != then[name]:
                raise ValueError(
                    f"expected data with the `{name}` that the weights of {str(self.source)!r} were trained with, got "
                    "another: its numbers would mean something else"
                )
        others = [name for name in then if name not in _MEANING and now.get(name) != then[name]]
        if others and trainer.state.fn != "fit":
            told = ", ".join(f"`{name}`" for name in others)
            rank_zero_warn(f"these are not the data and the split that the weights were trained on: {told} differ")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._load(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._load(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._load(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._load(trainer, pl_module)


def start_of(pretrained: str | None, init_from: str | None, configs: Iterable[str]) -> Path | str | None:
    """What is loaded for the options ``--pretrained`` and ``--init_from``.

    Args:
        pretrained: ``"zoo"``, ``"zoo:NAME"``, a folder of ``save_pretrained``, or a name on the hub.
        init_from: A checkpoint, or such a folder.
        configs: Their paths; the first model of the zoo among them names the weights of ``"zoo"``.

    Raises:
        ValueError: If both are given, or the zoo has no such weights.
        FileNotFoundError: If there is no such file.
    """
    if pretrained is not None and init_from is not None:
        raise ValueError(f"expected `pretrained` or `init_from`, got both, {pretrained!r} and {init_from!r}")
    if init_from is not None:
        if not Path(init_from).exists():
            raise FileNotFoundError(f"expected a checkpoint or a folder in `init_from`, got {init_from!r}")
        return Path(init_from)
    if pretrained is None or (pretrained != ZOO and not pretrained.startswith(catalog.PREFIX)):
        return pretrained
    name = catalog.model_of(configs) if pretrained == ZOO else pretrained.removeprefix(catalog.PREFIX)
    if name is None:
        raise ValueError(
            "expected a config of the zoo with `pretrained` zoo, got none; or give `zoo:NAME`, or a folder"
        )
    return weights.folder_of(name)
