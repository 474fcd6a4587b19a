"""Continuations of text: one token after the other, drawn from what a language model predicts."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tenzoo.layers import TensorizedEmbedding, TensorizedLayer, TensorizedLinear
from tenzoo.models.decoder import Attention, Block, Cache, Decoder, FeedForward


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: The logits are divided by it; 0 takes the largest.
        top_k: Only so many of the largest logits are drawn from; None takes all.
        top_p: Only the most probable tokens whose probabilities add up to it are drawn from (Holtzman et al. 2020,
            arXiv:1904.09751); 1 takes all.

    Raises:
        ValueError: If a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise TypeError(f"expected a number in `{name}`, got {getattr(self, name)!r}")
        if self.top_k is not None and not isinstance(self.top_k, int):
            raise TypeError(f"expected an int >= 1 or None in `top_k`, got {self.top_k!r}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"expected a finite number >= 0 in `temperature`, got {self.temperature}")
        if self.top_k is not None and (isinstance(self.top_k, bool) or self.top_k < 1):
            raise ValueError(f"expected an int >= 1 or None in `top_k`, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"expected a number in (0, 1] in `top_p`, got {self.top_p}")

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens ``(N,)`` for logits ``(N, num_tokens)``.

        Example:
            >>> Sampling(top_k=1).draw(torch.tensor([[0.0, 2.0, 1.0]])).tolist()
            [1]
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = self.probabilities(logits)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn with, ``(N, num_tokens)``, in single precision or a higher one; temperature above 0."""
        kind = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.double()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # at most 0, however low it is
        values, order = logits.sort(-1, descending=True)
        if self.top_k is not None:
            values[..., self.top_k :] = -math.inf
        sorted_probabilities = values.softmax(-1)
        before = sorted_probabilities.cumsum(-1) - sorted_probabilities
        sorted_probabilities[before >= self.top_p] = 0
        sorted_probabilities /= sorted_probabilities.sum(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, order, sorted_probabilities).to(kind)


@dataclass(frozen=True)
class Continuation(Sampling):
    """How a prompt is continued: as :class:`Sampling`, with a length and a seed.

    Args:
        temperature: As in :class:`Sampling`.
        top_k: As in :class:`Sampling`.
        top_p: As in :class:`Sampling`.
        length: Number of tokens to add.
        seed: Of the random numbers.

    Raises:
        ValueError: If a value is out of range.
    """

    temperature: float = 0.8
    length: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("length", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
                raise ValueError(f"expected an int from {least} to 2^63 - 1 in `{name}`, got {value!r}")

    def of(self, model: Decoder, prompt: Tensor, number: int = 0) -> Iterator[Tensor]:
        """The tokens that continue a prompt, one after the other; see :func:`generate`.

        Args:
            model: A decoder.
            prompt: Tokens ``(1, T)``, on the device of the model.
            number: Of the prompt. Each has random numbers of its own, whatever comes before it.
        """
        generator = torch.Generator(prompt.device).manual_seed(self.seed + number)
        return generate(model, prompt, self.length, sampling=self, generator=generator)


_DEFAULT = Sampling()


def generate(
    model: Decoder,
    prompt: Tensor,
    length: int,
    *,
    sampling: Sampling = _DEFAULT,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue prompts, one token at a time.

    Keys and values are kept between tokens. Where the context is full, the model goes on from the last half of it.
    Weights are rebuilt from cores once, before the first token, unless the layers are to contract them.

    Args:
        model: A decoder, in any mode; it computes as in evaluation.
        prompt: Tokens ``(N, T)``, at least one; of a long one the last ``context`` count.
        length: Number of tokens to add.
        sampling: How they are drawn.
        generator: Of the random numbers, on the device of the model.

    Returns:
        The next token of each prompt, ``(N,)``, again and again.

    Raises:
        ValueError: If the prompt is empty or of another shape, or ``length`` is below 0.

    Example:
        >>> model = Decoder(65)
        >>> tokens = generate(model, torch.zeros(1, 1, dtype=torch.long), 5, sampling=Sampling(temperature=0))
        >>> torch.stack(list(tokens), dim=1).shape
        torch.Size([1, 5])
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"expected tokens of shape (N, T), at least one, in `prompt`, got {tuple(prompt.shape)}")
    if isinstance(length, bool) or length < 0:
        raise ValueError(f"expected an int >= 0 in `length`, got {length}")
    return _tokens(model, prompt, length, sampling, generator)


def _tokens(
    model: Decoder, prompt: Tensor, length: int, sampling: Sampling, generator: torch.Generator | None
) -> Iterator[Tensor]:
    context = model.architecture.context
    if _can_be_rebuilt(model):
        model = model.to_dense()
    seen = new = prompt[:, -context:]
    cache = Cache()
    for _ in range(length):
        if cache.length + new.shape[1] > context:
            cache, new = Cache(), seen[:, -max(context // 2, 1) :]
        with torch.no_grad(), evaluating(model):
            logits = model(new, cache)[:, -1]
        new = sampling.draw(logits, generator)[:, None]
        seen = torch.cat([seen, new], dim=1)[:, -context:]
        yield new[:, 0]


_OWN = frozenset(
    (
        *(Decoder, Block, Attention, FeedForward, TensorizedLinear, TensorizedEmbedding),
        *(nn.ModuleList, nn.Embedding, nn.Linear, nn.RMSNorm, nn.LayerNorm, nn.Dropout),
    )
)
"""What a decoder makes."""


def _can_be_rebuilt(model: Decoder) -> bool:
    """Whether there are cores to rebuild, and a dense copy computes the same: no hooks, and no layers of others."""
    layers = [part for part in model.modules() if isinstance(part, TensorizedLayer)]
    cores = {id(part) for layer in layers for part in layer.factorization.modules()}
    others = [part for part in model.modules() if id(part) not in cores]
    changed = any(type(part) not in _OWN or part._forward_hooks or part._forward_pre_hooks for part in others)
    return bool(layers) and not changed and all(layer.implementation != "contract" for layer in layers)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode; each of its modules has its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
