"""Looking into a checkpoint before anything is built from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenzoo.messages import shown
from tenzoo.tasks.rank_search import AUTO, choice_of
from tenzoo.weight_files import load_torch

MISSING = object()
"""In place of a value that is not there."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of Lightning without running code from it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, is damaged, or holds more than tensors and builtins.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected an existing file in `ckpt_path`, got {str(path)!r}")
    checkpoint = load_torch(path, "a checkpoint of tensors and builtins in `ckpt_path`")
    if not isinstance(checkpoint, dict) or not {"state_dict", "global_step"} <= set(checkpoint):
        raise ValueError(f"expected a Lightning checkpoint in `ckpt_path`, got another kind of file: {str(path)!r}")
    settings = checkpoint.get("hyper_parameters", {})
    if not isinstance(checkpoint["state_dict"], dict) or not isinstance(settings, Mapping):
        raise ValueError(f"expected a Lightning checkpoint in `ckpt_path`, got other contents in {str(path)!r}")
    return checkpoint


def settle_rank(config: Any, checkpoint: Mapping[str, Any]) -> None:
    """Where a rank is chosen by the data, write what the checkpoint was trained with into the settings of the model.

    Args:
        config: The ``model`` of the configuration.
        checkpoint: As read.
    """
    settings = config.get("init_args") or {}
    if settings.get("rank") != AUTO:
        return
    choice = choice_of(checkpoint)
    settings["rank"] = choice.rank
    if choice.decay is not None:
        settings["core_weight_decay"] = choice.decay


def check_whole(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume from weights alone, without the states of optimizers and schedulers.

    Raises:
        ValueError: Naming the file.
    """
    if not {"optimizer_states", "lr_schedulers"} <= set(checkpoint):
        raise ValueError(
            f"expected a checkpoint of a whole run in `ckpt_path` for fit, got the weights alone: {str(path)!r}; give "
            "one saved without `save_weights_only`, or use this one to validate, test or predict"
        )


def check_same_settings(checkpoint: Mapping[str, Any], recorded: Any, config: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume a run with other settings of the model than it was started with.

    The optimizer's state in a checkpoint brings its own learning rate along, so a new one would silently lose.

    Args:
        checkpoint: As read.
        recorded: The ``model`` of the recorded configuration, or None.
        config: The same of the parsed one: ``class_path`` and ``init_args``, of builtins.
        path: Of the checkpoint, for the message.

    Raises:
        ValueError: Naming the first setting that differs and both values.
    """
    stored = _stored(checkpoint, recorded)
    stored.pop("_instantiator", None)
    if not stored:
        return
    now = _settings(config)
    for key in ("optimizer", "lr_scheduler"):
        if now.get(key) is not None and key not in stored:
            raise ValueError(
                f"expected a checkpoint that names its {key} in `ckpt_path`, got {str(path)!r}, made in Python: what "
                f"`model.init_args.{key}` sets could not be told from what its state brings along; resume it in Python"
            )
    if now.get("shape") is None:
        stored.pop("shape", None)  # it was taken from the data, whose own state is compared
    for key, old, new in differences(stored, now):
        name = "model.class_path" if key == "_class_path" else f"model.init_args.{key}"
        raise refusal(path, name, old, new)


_ALIKE = {"path", "plan", "weights", "implementation", "activation_checkpointing"}
"""Arguments of networks that say where files are, or how the same numbers are computed."""


def check_same_network(checkpoint: Mapping[str, Any], recorded: Any, config: Mapping[str, Any], path: Path) -> None:
    """Refuse to judge the weights of a checkpoint in a network of other settings, which shapes of weights do not show.

    Args:
        checkpoint: As read.
        recorded: The ``model`` of the recorded configuration, or None.
        config: The same of the parsed one: ``class_path`` and ``init_args``, of builtins.
        path: Of the checkpoint, for the message.

    Raises:
        ValueError: Naming the first setting that differs and both values.
    """
    old = _stored(checkpoint, recorded).get("network")
    if old is None:  # made in Python, or with a task that makes its network itself
        return
    for name, had, got in differences(old, _settings(config).get("network"), "model.init_args.network"):
        if name.rpartition(".")[2] not in _ALIKE:
            raise ValueError(
                f"expected the network of the checkpoint {str(path)!r}, got `{name}` = {_short(got)} where it has "
                f"{_short(had)}; give its settings"
            )


def _stored(checkpoint: Mapping[str, Any], recorded: Any) -> dict[str, Any]:
    """The settings of a checkpoint's model; what it did not save itself is taken from the record of its run."""
    return {**_settings(recorded), **checkpoint.get("hyper_parameters", {})}


def _settings(model: Any) -> dict[str, Any]:
    """Of a ``model`` in a configuration, by the names that hyperparameters have."""
    if not isinstance(model, Mapping):
        return {}
    given = [each for each in (model.get("init_args"), model.get("dict_kwargs")) if isinstance(each, Mapping)]
    return {"_class_path": model.get("class_path"), **{key: each[key] for each in given for key in each}}


def refusal(path: Path, name: str, old: Any, new: Any) -> ValueError:
    """What to raise where a setting differs from that of a checkpoint.

    Args:
        path: Of the checkpoint.
        name: Of the setting.
        old: In the checkpoint.
        new: As given.
    """
    return ValueError(
        f"expected the settings of the checkpoint {str(path)!r} on resume, got `{name}` = {_short(new)} where it has "
        f"{_short(old)}; resume with that, or start a new run"
    )


def _short(value: Any) -> str:
    return "none" if value is MISSING else shown(value)


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Name, old and new value of what differs; names that only the new mapping has, at its top, are no difference."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        old, new = ({str(name): value for name, value in mapping.items()} for mapping in (old, new))
        names = dict.fromkeys([*old, *new]) if key else old  # arguments that are new to the task are no difference
        return [
            difference
            for name in names
            for difference in differences(
                old.get(name, MISSING), new.get(name, MISSING), f"{key}.{name}" if key else name
            )
        ]
    old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
    return [] if old == new or new is MISSING else [(key, old, new)]
