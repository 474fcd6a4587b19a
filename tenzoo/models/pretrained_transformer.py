"""Pretrained models of Hugging Face's transformers that classify text, with adapters."""

import copy
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

Precision = Literal["float32", "bfloat16", "float16"]

T = TypeVar("T")


class NoPretrainedModelError(FileNotFoundError):
    """A pretrained model that is not there."""


class NoTextPackagesError(ImportError):
    """Packages of the extra ``text`` that are not installed."""


class PretrainedTransformer(nn.Module):
    """A model of transformers with a head for classes or numbers, and its frozen weights adapted.

    It maps the output of a tokenizer, named tensors ``(N, length)``, to ``(N, num_classes)``: logits of classes, or one
    number. The head is new, unless the files have one of this size. With an adapter all weights are frozen but the
    adapter's and the head's. Without one all are trained.

    With ``label_words`` it is a language model, and the logits are those of one word per class as the next token: no
    head is made, and the text ends where the word is expected.

    Args:
        path: Folder of a model, or its name on the hub. What begins with ``.``, ``/`` or ``~`` is a folder.
        num_classes: Number of classes; 1 for regression.
        adapter: Arguments of :class:`~tenzoo.adapters.TensorAdapterConfig`, or a config of PEFT.
        dtype: Precision of the pretrained weights. Adapters are in single precision.
        activation_checkpointing: Whether to compute activations anew in the backward pass.
        label_words: A word of one token for each class.
        gguf_file: Name of a GGUF file in the folder, which is read in place of other weights.

    Raises:
        NoTextPackagesError: If transformers or PEFT is not installed.
        NoPretrainedModelError: If there is no such model.
        TypeError: If ``num_classes`` or ``adapter`` is of another type, or ``adapter`` has an argument that the config
            does not have.
        ValueError: If an argument does not fit the model.
    """

    def __init__(
        self,
        path: str,
        num_classes: int = 2,
        *,
        adapter: dict[str, Any] | None = None,
        dtype: Precision = "float32",
        activation_checkpointing: bool = False,
        label_words: Sequence[str] | None = None,
        gguf_file: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_classes, int):
            raise TypeError(f"expected an int >= 1 in `num_classes`, got {num_classes!r}")
        if isinstance(num_classes, bool) or num_classes < 1:
            raise ValueError(f"expected an int >= 1 in `num_classes`, got {num_classes}")
        if label_words is not None and len(label_words) != num_classes:
            raise ValueError(f"expected {num_classes} words in `label_words`, one per class, got {list(label_words)}")
        settings: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        if gguf_file is not None:
            settings["gguf_file"] = gguf_file
        if label_words is None:
            settings["num_labels"] = num_classes
        self.model = _load(path, has_head=label_words is None, settings=settings, frozen=adapter is not None)
        self.label_tokens = None if label_words is None else _tokens(path, label_words, gguf_file)
        if activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if adapter is not None:
            self.model = _adapted(self.model, adapter)
        self.path = path
        self.frozen_checksum = checksum(of_files(self.frozen_weights()))
        self.train()  # transformers hands models out in evaluation mode, and Lightning keeps the mode

    def frozen_weights(self) -> dict[str, nn.Parameter]:
        """The parameters that are not trained, by name: where there is an adapter, those of the files.

        PEFT keeps the untrained head beside the one that is trained. It is here, too, though nothing uses it.
        """
        return {name: parameter for name, parameter in self.named_parameters() if not parameter.requires_grad}

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits or numbers, ``(N, num_classes)``.

        Args:
            **inputs: What the tokenizer gives: ``input_ids``, ``attention_mask`` and others, ``(N, length)`` each.
        """
        logits: Tensor = self.model(**inputs).logits
        if self.label_tokens is None:
            return logits
        last = inputs["attention_mask"].long().cumsum(1).argmax(1)  # padding may be on either side
        return logits[torch.arange(len(logits), device=logits.device), last][:, self.label_tokens]


def of_files(frozen: Mapping[str, T]) -> dict[str, T]:
    """The frozen weights without PEFT's copy of the untrained head, which is drawn anew each time.

    Example:
        >>> of_files({"bert.weight": 1, "classifier.original_module.weight": 2})
        {'bert.weight': 1}
    """
    return {name: tensor for name, tensor in frozen.items() if ".original_module." not in name}


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, types and weighted sums of the bits of each tensor, which are computed where it is.

    Example:
        >>> checksum({"a": torch.tensor([1.0, 2.0])}) == checksum({"a": torch.tensor([2.0, 1.0])})
        False
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        bits = tensor.detach().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16).flatten()
        parts = torch.split(bits, _WEIGHED)
        sums = [int((part * _odd_numbers(len(part), part.device)).sum()) for part in parts]
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype), sums)).encode())
    return digest.hexdigest()


_WEIGHED = 2**22
"""Numbers of a tensor that are weighed and summed together."""


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    """Pseudo-random odd numbers, int64: sums of products with them, modulo 2^64, tell the order of what is summed."""
    numbers = torch.arange(count, device=device) * 0x2545F4914F6CDD1D
    return (numbers ^ (numbers >> 29)) | 1


def _load(path: str, *, has_head: bool, settings: Mapping[str, Any], frozen: bool) -> Any:
    """The pretrained model; what is new in it is a head, and without adapters a layer that pools.

    Raises:
        NoTextPackagesError: If transformers is not installed.
        NoPretrainedModelError: If there is no such model.
        ValueError: If weights are missing.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    except ImportError as error:
        raise NoTextPackagesError("PretrainedTransformer needs transformers: pip install 'tenzoo[text]'") from error
    if path[:1] in (".", "/", "~") and not Path(path).expanduser().is_dir():
        raise NoPretrainedModelError(f"expected an existing folder in `path`, got {path!r}")
    if _is_out_of_reach(path):
        raise NoPretrainedModelError(
            "expected a folder, or a model that was fetched before, in `path` while HF_HUB_OFFLINE is set, got "
            f"{path!r}"
        )
    kind: Any = AutoModelForSequenceClassification if has_head else AutoModelForCausalLM
    try:
        with _quiet():
            place = str(Path(path).expanduser()) if path[:1] == "~" else path
            model, found = kind.from_pretrained(place, **settings, output_loading_info=True)
    except OSError as error:  # of several lines, with advice on the hub
        reason = str(error).splitlines()[0]
        raise NoPretrainedModelError(
            f"expected the folder of a model of transformers, or its name on the hub, in `path`, got {path!r}: {reason}"
        ) from None
    inner = f"{model.base_model_prefix}."
    missing = [
        name
        for name in sorted(found["missing_keys"])
        if not has_head or (name.startswith(inner) and (frozen or ".pooler." not in name))
    ]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"expected all weights of a {type(model).__name__} in `path`, got {path!r} without {missing[0]!r}{others}"
        )
    return model


def _is_out_of_reach(path: str) -> bool:
    """Whether a model would have to be fetched although ``HF_HUB_OFFLINE`` forbids it.

    The hub's library reads the variable only when it is imported.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE") or Path(path).is_dir():
        return False
    from huggingface_hub import try_to_load_from_cache

    try:
        return not isinstance(try_to_load_from_cache(path, "config.json"), str)
    except ValueError:  # no name that the hub could have
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a progress bar, and without the list of weights that a head is made new for."""
    from transformers.utils import logging as transformers_logging

    shows_progress = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    try:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity(logging.ERROR)
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shows_progress:
            transformers_logging.enable_progress_bar()


def _adapted(model: Any, adapter: Any) -> Any:
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise NoTextPackagesError("adapters need PEFT: pip install 'tenzoo[text]'") from error
    from tenzoo.adapters import TensorAdapterConfig

    if isinstance(adapter, Mapping):
        unknown = sorted(adapter.keys() - TensorAdapterConfig.__dataclass_fields__.keys())
        if unknown:
            raise TypeError(f"expected arguments of TensorAdapterConfig in `adapter`, got {unknown[0]!r}")
        config = TensorAdapterConfig(**adapter)
    elif isinstance(adapter, PeftConfig):
        config = copy.deepcopy(adapter)
    else:
        raise TypeError(f"expected a dict or a config of PEFT in `adapter`, got {type(adapter).__name__}")
    if config.modules_to_save is None:
        config.modules_to_save = _heads(model)
    return get_peft_model(model, config)


def _heads(model: nn.Module) -> list[str] | None:
    """The modules with weights around the pretrained part."""
    if "ForCausalLM" in type(model).__name__:
        return None
    names = [
        name
        for name, child in model.named_children()
        if name != getattr(model, "base_model_prefix", None) and next(child.parameters(), None) is not None
    ]
    return names or None


def _tokens(path: str, words: Sequence[str], gguf_file: str | None) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, **({} if gguf_file is None else {"gguf_file": gguf_file}))
    found = {word: tokenizer.encode(word, add_special_tokens=False) for word in words}
    for word, tokens in found.items():
        if len(tokens) != 1:
            raise ValueError(f"expected words of one token in `label_words`, got {word!r} of {len(tokens)} tokens")
    if len({tokens[0] for tokens in found.values()}) < len(words):
        raise ValueError(f"expected distinct words in `label_words`, got {list(words)}")
    return [tokens[0] for tokens in found.values()]
