"""Trained tasks as folders: weights, settings and a card."""

import importlib
import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from torch import Tensor

from tenzoo.atomic import atomic_write
from tenzoo.distributed import is_first_process
from tenzoo.messages import shown
from tenzoo.state_dicts import kind_differences, shape_differences, with_current_names
from tenzoo.tasks.hyperparameters import is_plain, own_arguments
from tenzoo.weight_files import load_torch, read_weights, weights_of

SETTINGS, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
"""Files of a folder."""

_OWN = "tenzoo."
_FORMAT = 1
_RUN = frozenset({"epoch_means"})
"""What a checkpoint has of a run and not of the trained weights."""


class PretrainedMethods(LightningModule):
    """Saves a task to a folder of safetensors, JSON and Markdown, and loads it again, whole or not at all."""

    def save_pretrained(self, folder: str | Path, *, card: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Write the weights to ``model.safetensors``, the settings to ``config.json``, a card to ``README.md``.

        Arguments that were given as objects, such as a network made in Python, are not saved: they are given to
        :meth:`from_pretrained` again.

        Args:
            folder: A new folder, or one without these files.
            card: Text in Markdown; None writes a short one.
            dtype: Of the floating-point weights in the file; None keeps theirs.

        Raises:
            ValueError: If the folder has one of the files, the task has no weights yet, weights are not finite in
                ``dtype``, or a hook adds something to checkpoints that JSON cannot hold.
        """
        folder = Path(folder)
        for name in (SETTINGS, WEIGHTS, CARD):
            if (folder / name).exists():
                raise ValueError(f"expected a folder without {name} in `folder`, got {str(folder)!r} with one")
        weights, state = self._contents()
        alike = _alike(weights)
        settings = {
            "format": _FORMAT,
            "task": f"{type(self).__module__}.{type(self).__qualname__}",
            "arguments": {name: value for name, value in _arguments(self).items() if name != "_class_path"},
            "objects": _objects(self),
            "state": state,
            "data": self._data_state(),
            "alike": alike,
        }
        try:
            text = json.dumps(settings, indent=1, ensure_ascii=False)
        except TypeError as error:
            raise ValueError(
                f"expected builtins in what on_save_checkpoint() adds for `save_pretrained`: {error}"
            ) from error
        from safetensors.torch import save

        kept = {name: weights[name].detach().cpu().contiguous() for name in weights if name not in alike}
        if dtype is not None:
            kept = {name: value.to(dtype) if value.is_floating_point() else value for name, value in kept.items()}
            check_same(kept, kept, folder, whole=True)
        if not is_first_process():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / WEIGHTS) as unfinished:
            unfinished.write_bytes(save(kept))  # save_file would make a file that its owner alone can read
        for name, content in ((SETTINGS, text + "\n"), (CARD, card or _short_card(self, weights))):
            with atomic_write(folder / name) as unfinished:
                unfinished.write_text(content, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, source: str | Path, **arguments: Any) -> Self:
        """The task of a folder, of a repository on the Hugging Face hub, or of a checkpoint of the command line.

        The classes that the settings name are imported, as those of a config are. All weights must be there, with
        the shapes of the task, and no others.

        Args:
            source: A folder of :meth:`save_pretrained`; the name of a repository, such as ``"user/name"``; or a file
                of ``tenzoo fit``.
            **arguments: Of the constructor; they replace those that were saved.

        Raises:
            FileNotFoundError: If there is neither such a folder nor ``huggingface_hub`` to look for a repository.
            ValueError: If a file is damaged, the task is of another class, or a weight is missing, has another shape,
                or is one too many.
        """
        saved = _opened(source)
        if saved.task is None:
            raise ValueError(f"expected a checkpoint of tenzoo fit, got another file: {str(source)!r}")
        kind = _class_of(saved.task, cls, source)
        given = {**saved.arguments, **arguments}
        if missing := sorted(set(saved.objects) - set(given)):
            names = ", ".join(f"`{name}`" for name in missing)
            raise ValueError(
                f"expected {names} for {str(source)!r}, got none: it was saved with objects made in Python"
            )
        task: Self = _made(kind, given)
        task._load(saved)
        return task.eval()

    def load_pretrained(self, source: str | Path) -> None:
        """Load weights into this task, which may differ from the task that was saved in all but the shapes of weights.

        Args:
            source: A folder of :meth:`save_pretrained`, a repository of the hub, or a checkpoint of Lightning.

        Raises:
            FileNotFoundError: If it is none of them.
            ValueError: As :meth:`from_pretrained`; the task then stays as it is.
        """
        self._load(_opened(source))

    def _load(self, saved: "_Saved") -> None:
        own = self.state_dict()
        weights = with_current_names(saved.weights, own)
        content: dict[str, Any] = {"state_dict": weights, **saved.state}
        check_same(own, weights, saved.place, whole="pretrained" not in saved.state)
        self.on_load_checkpoint(content)  # which may add frozen weights by what the state says
        check_same(own, content["state_dict"], saved.place, whole=True)
        self.load_state_dict(content["state_dict"])
        self.trained_on = saved.data

    def push_to_hub(
        self, repository: str, *, card: str | None = None, private: bool = False, token: str | None = None
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to a repository of the Hugging Face hub.

        Args:
            repository: Its name, such as ``"user/name"``; it is made if it is not there.
            card: As in :meth:`save_pretrained`.
            private: Whether a new repository is private.
            token: Of the account; None takes that of ``hf auth login``.

        Returns:
            The address of the commit.

        Raises:
            ImportError: If ``huggingface_hub`` is not installed.
        """
        hub = _hub()
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(temporary, card=card)
            api = hub.HfApi(token=token)
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=temporary))

    trained_on: Mapping[str, Any] | None = None
    """What the data module of the loaded weights noted of its data, without its place in them; None if not known."""

    def _data_state(self) -> Mapping[str, Any] | None:
        """That of the data module of the run, or of the weights that were loaded."""
        data = getattr(self._trainer, "datamodule", None)
        return self.trained_on if data is None else fingerprint(data.state_dict())

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights, and what else a checkpoint of this task needs."""
        content: dict[str, Any] = {"state_dict": self.state_dict()}
        self.on_save_checkpoint(content)
        weights: dict[str, Tensor] = content.pop("state_dict")
        if not weights:
            raise ValueError(f"expected a {type(self).__name__} with weights, got one that is not built yet")
        return weights, {name: value for name, value in content.items() if name not in _RUN}


@dataclass(frozen=True)
class _Saved:
    """What a folder or a checkpoint holds.

    Args:
        place: Of it, for messages.
        weights: By name.
        state: What else a checkpoint has.
        data: What the data module noted of its data, if that is known.
        task: The class, if that is known.
        arguments: With which the task is made again.
        objects: Names of those that are not saved.
    """

    place: Path
    weights: dict[str, Tensor]
    state: Mapping[str, Any]
    data: Mapping[str, Any] | None
    task: str | None
    arguments: Mapping[str, Any]
    objects: Sequence[str]


def _opened(source: str | Path) -> _Saved:
    """Read a folder, a repository of the hub, or a checkpoint, once."""
    path = Path(source)
    if path.is_file():
        return _of_checkpoint(path)
    folder = pretrained_folder(source)
    settings = read_settings(folder)
    weights = read_weights(folder / WEIGHTS)
    weights |= {name: weights[other] for name, other in settings["alike"].items() if other in weights}
    known = {name: settings[name] for name in ("state", "task", "arguments", "objects")}
    return _Saved(folder, weights, data=settings.get("data"), **known)


def _of_checkpoint(path: Path) -> _Saved:
    content = load_torch(path, "a checkpoint of tensors and builtins")
    weights = weights_of(content, path)
    data = next((content[name] for name in content if name.endswith("DataModule")), None)
    arguments = content.get("hyper_parameters")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    task = arguments.get("_class_path")
    return _Saved(
        path,
        weights,
        state={name: content[name] for name in content if name not in {"state_dict", *_RUN}},
        data=fingerprint(data) if isinstance(data, Mapping) else None,
        task=task if isinstance(task, str) else None,
        arguments={name: value for name, value in arguments.items() if name != "_class_path"},
        objects=(),
    )


def fingerprint(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The builtins in the state of a data module, without its place in the data, as JSON gives them back.

    Example:
        >>> fingerprint({"seed": 1, "shape": (2, 3), "drawn": torch.ones(2), "train_loader": {"batch": 4}})
        {'seed': 1, 'shape': [2, 3]}
    """
    plain = {name: value for name, value in state.items() if name != "train_loader" and is_plain(value)}
    told: Mapping[str, Any] = json.loads(json.dumps(plain))
    return told


def pretrained_folder(source: str | Path) -> Path:
    """A folder, or a copy of a repository of the hub.

    Raises:
        FileNotFoundError: If there is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    name = str(source)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        try:
            return Path(_hub().snapshot_download(name, allow_patterns=[SETTINGS, WEIGHTS, CARD]))
        except Exception as error:  # of the network, of the hub, of a missing package: each has its own
            said = " ".join(str(error).split())[:200]
            raise FileNotFoundError(f"expected a folder or a repository of the hub, got {name!r}: {said}") from error
    raise FileNotFoundError(f"expected a folder in `source`, got {name!r}, which does not exist")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder.

    Raises:
        FileNotFoundError: If it has none.
        ValueError: If they are of another kind.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a folder of save_pretrained in `source`, got {str(folder)!r} without {SETTINGS}"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {str(path)!r}, got {error}") from error
    kinds = {"task": str, "arguments": dict, "objects": list, "state": dict, "alike": dict}
    if (
        not isinstance(settings, Mapping)
        or settings.get("format") != _FORMAT
        or not all(isinstance(settings.get(name), kind) for name, kind in kinds.items())
    ):
        raise ValueError(f"expected settings of format {_FORMAT} in {str(path)!r}, got {shown(settings)}")
    return dict(settings)


def check_same(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], place: Path, *, whole: bool) -> None:
    """Refuse weights that are not those of a task.

    Args:
        own: Of the task.
        weights: Of the file.
        place: For the message.
        whole: Whether all must be there.

    Raises:
        ValueError: Naming the first that differs, is missing, or is not finite.
    """
    for name, mine, other in shape_differences(own, weights):
        if other is not None or whole:
            expected = "no such weight" if mine is None else f"the shape {mine}"
            raise ValueError(f"expected {expected} for {name!r} in {str(place)!r}, got {other or 'none'}")
    for name, kind, other_kind in kind_differences(own, weights):
        raise ValueError(f"expected {kind} for {name!r} in {str(place)!r}, got {other_kind}")
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"expected finite numbers in {name!r} in {str(place)!r}, got NaN or infinity")


def _class_of(name: str, cls: type, source: str | Path) -> type:
    """The class of a task: one of tenzoo, or one that the program has imported."""
    known = {f"{each.__module__}.{each.__qualname__}": each for each in _with_subclasses(cls)}
    if name not in known and name.startswith(_OWN):
        module, _, own = name.rpartition(".")
        found = getattr(importlib.import_module(module), own, None)
        if inspect.isclass(found) and issubclass(found, cls):
            return found
    if name not in known:
        raise ValueError(
            f"expected a {cls.__name__} in {str(source)!r}, got {name!r}; if it is a class of your own, import it first"
        )
    return known[name]


def _with_subclasses(cls: type) -> list[type]:
    found: list[type] = [cls]
    for kind in found:  # grows while it is walked
        direct: list[type] = kind.__subclasses__()
        found += [each for each in direct if each not in found]
    return found


def _made(kind: type, arguments: dict[str, Any]) -> Any:
    """A task of arguments as a config gives them, or as Python does."""
    plain = {name: value for name, value in arguments.items() if name != "_instantiator"}
    if "_instantiator" not in arguments:
        return kind(**plain)
    noted = {"_class_path": f"{kind.__module__}.{kind.__qualname__}", **plain}
    with _given_hyperparameters_context(hparams=noted, instantiator=arguments["_instantiator"]):
        return instantiate_module(kind, plain)


def _arguments(task: LightningModule) -> dict[str, Any]:
    """Those with which the task is made again; what it learned from its data, such as a shape, is among them."""
    own = own_arguments(task)
    known = dict(task.hparams)
    return known if "_instantiator" in known else {name: known.get(name, value) for name, value in own.items()}


def _objects(task: LightningModule) -> list[str]:
    """Names of arguments without a default that were given as objects."""
    parameters = inspect.signature(type(task)).parameters.values()
    fixed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [each.name for each in parameters if each.default is each.empty and each.kind not in fixed]
    return [name for name in needed if name not in _arguments(task)]


def _alike(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of tensors that are another one, such as those of a tied head, which a file has once."""
    first: dict[tuple[Any, ...], str] = {}
    alike: dict[str, str] = {}
    for name, value in weights.items():
        key = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
        if value.numel() and key in first:
            alike[name] = first[key]
        first.setdefault(key, name)
    return alike


def _short_card(task: LightningModule, weights: Mapping[str, Tensor]) -> str:
    kind = type(task).__name__
    number = sum(parameter.numel() for parameter in task.parameters())
    return (
        f"---\nlibrary_name: tenzoo\n---\n\n# {kind}\n\n{number:,} parameters.\n\n```python\n"
        f'from {type(task).__module__} import {kind}\n\ntask = {kind}.from_pretrained("FOLDER")\n```\n'
    )


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("expected huggingface_hub, got no such package; pip install huggingface_hub") from error
    return huggingface_hub
