"""Causal language models: transformers that predict the next token, dense or made of cores."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tenzoo.factorizations import FactorizationName, Rank
from tenzoo.layers import Implementation, TensorizedLayer
from tenzoo.layers.tensorization import check_sizes
from tenzoo.models.parts import Part, Parts

Norm: TypeAlias = Literal["rms", "layer"]
Positions: TypeAlias = Literal["rotary", "learned"]
Activation: TypeAlias = Literal["swiglu", "gelu"]

_NORMS: dict[str, type[nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
_ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class Architecture:
    """What a decoder is made of; see :class:`Decoder`."""

    num_tokens: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    hidden_width: int
    context: int
    norm: Norm
    positions: Positions
    activation: Activation
    dropout: float

    def __post_init__(self) -> None:
        for name, kinds in (("norm", Norm), ("positions", Positions), ("activation", Activation)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"expected one of {sorted(get_args(kinds))} in `{name}`, got {getattr(self, name)!r}")
        dropout = self.dropout
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"expected a number in [0, 1) in `dropout`, got {dropout!r}")
        sizes = ("num_tokens", "width", "depth", "heads", "kv_heads", "hidden_width", "context")
        check_sizes(**{name: getattr(self, name) for name in sizes})
        if self.width % self.heads:
            raise ValueError(f"expected a divisor of the width {self.width} in `heads`, got {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"expected a divisor of the {self.heads} heads in `kv_heads`, got {self.kv_heads}")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(
                f"expected heads of an even width for rotary positions, got {self.heads} in `heads` of the width "
                f"{self.width}, {self.head_width} each"
            )

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    def normalization(self) -> nn.Module:
        """A layer that normalizes the stream."""
        return _NORMS[self.norm](self.width)


class Decoder(nn.Module):
    """A causal language model of pre-norm blocks (Vaswani et al. 2017, arXiv:1706.03762, as a decoder alone).

    Each block adds to a stream of vectors first the attention of each position to those up to its own, then a
    feed-forward network of each position, both of the normalized stream. The logits are the head times the stream after
    the last block, normalized.

    With ``factorization`` the chosen parts are made of cores, found by :func:`~tenzoo.cores.find_core_groups` under
    names such as ``"blocks.0.attention.query.weight"``. With ``tied`` the head is the table of tokens: its cores are
    one group, which gets the gradients of both uses.

    Weights start with mean 0 and variance ``1/fan_in``, that of the table with ``1/width``, and those of the
    projections back into the stream with ``1/(2 depth fan_in)`` (Radford et al. 2019, section 2.3), in every format.

    Args:
        num_tokens: Size of the vocabulary. In a config, None is that of the text of a TextCorpusDataModule.
        width: Size of a vector of the stream.
        depth: Number of blocks.
        heads: Number of heads of the queries, a divisor of ``width``.
        kv_heads: Number of heads of keys and values, a divisor of ``heads`` (Ainslie et al. 2023, arXiv:2305.13245); by
            default as many as of the queries.
        hidden_width: Size within feed-forward; by default ``4 width`` for ``"gelu"``, and for ``"swiglu"``, which has a
            third matrix, ``8/3 width``, rounded up to a multiple of 8.
        context: Largest number of tokens that the model sees.
        norm: ``"rms"`` (Zhang and Sennrich 2019, arXiv:1910.07467) or ``"layer"``.
        positions: ``"rotary"``, rotations of queries and keys (Su et al. 2021, arXiv:2104.09864), or ``"learned"``, a
            table that is added to the embeddings.
        activation: ``"swiglu"``, ``silu(A x) ⊙ (B x)`` (Shazeer 2020, arXiv:2002.05202), or ``"gelu"``.
        dropout: Share of the embeddings, and of what is added to the stream, that is dropped in training.
        tied: Whether the head is the table of tokens.
        factorization: A name such as ``"tt"`` or an einsum, for all of the embedding, attention, feed-forward and head,
            or a mapping of some of ``"embedding"``, ``"attention"``, ``"feed_forward"`` and ``"head"`` to such; None is
            the dense model.
        rank: The rank of each layer of cores: one number, a list, a fraction of its dense parameters, or a mapping from
            the parts to such.
        budget: Instead of a rank: the number of parameters, or the fraction of those of the dense model, that the whole
            model may have. All layers of cores then have the same rank, the largest that keeps to it.
        implementation: How layers of cores are computed.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a value is out of range, or settings contradict each other or do not fit a layer. The message
            names the layer.

    Example:
        >>> model = Decoder(65, width=128, factorization={"attention": "tt", "feed_forward": "tt"}, budget=110_592)
        >>> sum(parameter.numel() for parameter in model.parameters()) <= 110_592
        True
        >>> model(torch.zeros(2, 10, dtype=torch.long)).shape
        torch.Size([2, 10, 65])
    """

    def __init__(
        self,
        num_tokens: int | None,
        *,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        kv_heads: int | None = None,
        hidden_width: int | None = None,
        context: int = 256,
        norm: Norm = "rms",
        positions: Positions = "rotary",
        activation: Activation = "swiglu",
        dropout: float = 0.0,
        tied: bool = True,
        factorization: FactorizationName | Mapping[Part, FactorizationName] | None = None,
        rank: Rank | Mapping[Part, Rank] | None = None,
        budget: int | float | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        if num_tokens is None:
            raise ValueError("expected an int >= 1 in `num_tokens`, got None, which only a config with a text can have")
        check_sizes(width=width)
        if not isinstance(tied, bool):
            raise TypeError(f"expected True or False in `tied`, got {tied!r}")
        if isinstance(factorization, Mapping) and not any(factorization.values()):
            raise ValueError(f"expected a format for some part in `factorization`, got {factorization!r}")
        if hidden_width is None:
            hidden_width = 4 * width if activation == "gelu" else 8 * math.ceil(width / 3)
        self.architecture = Architecture(
            num_tokens,
            width,
            depth,
            heads,
            heads if kv_heads is None else kv_heads,
            hidden_width,
            context,
            norm,
            positions,
            activation,
            dropout,
        )
        if budget is not None and (factorization is None or rank is not None):
            given = "no `factorization`" if factorization is None else f"the `rank` {rank!r} as well"
            raise ValueError(f"expected a `factorization` and no `rank` with `budget`, got {given}")
        self.tied = tied
        parts = Parts(factorization, 1 if rank is None and budget is not None else rank, implementation, tied=tied)
        self._make(parts)
        if budget is not None:
            total = sum(parameter.numel() for parameter in self.parameters())
            self._make(parts.with_rank(parts.rank_within(budget, total)))

    def _make(self, parts: Parts) -> None:
        """Make all layers."""
        own = self.architecture
        self.embedding = parts.embedding(own.num_tokens, own.width)
        self.positions = nn.Embedding(own.context, own.width) if own.positions == "learned" else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=own.width**-0.5)
        self.dropout = nn.Dropout(own.dropout)
        self.blocks = nn.ModuleList(Block(own, parts, f"blocks.{k}") for k in range(own.depth))
        self.norm = own.normalization()
        self.head = parts.head(self.embedding)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return self.architecture.num_tokens

    def forward(self, tokens: Tensor, cache: "Cache | None" = None) -> Tensor:
        """Predict the token after each position.

        Args:
            tokens: Integers ``(N, T)``.
            cache: Keys and values of the tokens before these; those of these are added to it.

        Returns:
            Logits, ``(N, T, num_tokens)``.

        Raises:
            ValueError: For tokens of another shape, or more of them than the context.
        """
        own = self.architecture
        if tokens.ndim != 2:
            raise ValueError(f"expected shape (N, T) in `tokens`, got {tuple(tokens.shape)}")
        start = 0 if cache is None else cache.length
        length = start + tokens.shape[1]
        if isinstance(length, int) and length > own.context:
            raise ValueError(f"expected at most {own.context} tokens, the context, in `tokens`, got {length}")
        places = torch.arange(start, length, device=tokens.device)
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(places)
        x = self.dropout(x)
        turns = rotations(places, own.head_width) if own.positions == "rotary" else None
        for number, block in enumerate(self.blocks):
            x = block(x, turns, None if cache is None else cache.of_block(number))
        if cache is not None:
            cache.length = length
        logits: Tensor = self.head(self.norm(x))
        return logits[..., : own.num_tokens]

    def to_dense(self) -> "Decoder":
        """The dense model that computes the same; a copy, in the same mode."""
        weights = {name: value for name, value in self.state_dict().items() if ".factorization." not in name}
        weights |= {
            f"{name}.weight": module.weight
            for name, module in self.named_modules()
            if isinstance(module, TensorizedLayer)
        }
        if self.tied:
            weights["head.weight"] = weights["embedding.weight"]
        with torch.device("meta"):  # nothing is drawn
            dense = Decoder(**vars(self.architecture), tied=self.tied)
        weights = {name: weights[name].detach().clone() for name in dense.state_dict()}
        dense.load_state_dict(weights, assign=True)
        if self.tied:
            dense.head.weight = dense.embedding.weight
        return dense.requires_grad_().train(self.training)


class Block(nn.Module):
    """``y = x + attention(norm(x))`` and ``y + feed_forward(norm(y))``."""

    def __init__(self, own: Architecture, parts: Parts, name: str) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = own.normalization(), own.normalization()
        self.attention = Attention(own, parts, f"{name}.attention")
        self.feed_forward = FeedForward(own, parts, f"{name}.feed_forward")
        self.dropout = nn.Dropout(own.dropout)

    def forward(self, x: Tensor, turns: Tensor | None, past: "Past | None") -> Tensor:
        """The stream after the block, ``(N, T, width)``."""
        x = x + self.dropout(self.attention(self.attention_norm(x), turns, past))
        added: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x + added


class Attention(nn.Module):
    """Attention of each position to itself and those before it."""

    def __init__(self, own: Architecture, parts: Parts, name: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = own.heads, own.kv_heads, own.head_width
        std, shared = own.width**-0.5, own.kv_heads * own.head_width
        self.query = parts.linear("attention", f"{name}.query", own.width, own.width, std)
        self.key = parts.linear("attention", f"{name}.key", own.width, shared, std)
        self.value = parts.linear("attention", f"{name}.value", own.width, shared, std)
        self.output = parts.linear("attention", f"{name}.output", own.width, own.width, std / math.sqrt(2 * own.depth))

    def forward(self, x: Tensor, turns: Tensor | None, past: "Past | None") -> Tensor:
        """What attention adds to the stream, ``(N, T, width)``."""
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if turns is not None:
            query, key = rotated(query, turns), rotated(key, turns)
        before = 0 if past is None else past.length
        if past is not None:
            key, value = past.extended(key, value)
        if self.kv_heads < self.heads:
            key, value = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (key, value))
        mask = _later(query, key) if before and query.shape[2] > 1 else None
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=not before)
        added: Tensor = self.output(y.transpose(1, 2).flatten(2))
        return added


def _later(query: Tensor, key: Tensor) -> Tensor:
    """Which keys each of the last positions may attend to, ``(T, S)``."""
    size, whole = query.shape[2], key.shape[2]
    return torch.ones(size, whole, dtype=torch.bool, device=query.device).tril(whole - size)


class FeedForward(nn.Module):
    """``C (silu(A x) ⊙ (B x))``, or ``C gelu(A x)``."""

    def __init__(self, own: Architecture, parts: Parts, name: str) -> None:
        super().__init__()
        std = own.width**-0.5
        self.inner = parts.linear("feed_forward", f"{name}.inner", own.width, own.hidden_width, std)
        self.gate = None
        if own.activation == "swiglu":
            self.gate = parts.linear("feed_forward", f"{name}.gate", own.width, own.hidden_width, std)
        back = own.hidden_width**-0.5 / math.sqrt(2 * own.depth)
        self.output = parts.linear("feed_forward", f"{name}.output", own.hidden_width, own.width, back)

    def forward(self, x: Tensor) -> Tensor:
        """What feed-forward adds to the stream, ``(N, T, width)``."""
        inner = self.inner(x)
        y: Tensor = self.output(F.gelu(inner) if self.gate is None else F.silu(self.gate(x)) * inner)
        return y


# --- positions -----------------------------------------------------------------------------------------------------


def rotations(places: Tensor, width: int) -> Tensor:
    """Cosines and sines of the angles ``p · 10000^(−2k/width)`` at the places p, ``(2, T, width/2)`` in float32.

    Example:
        >>> rotations(torch.tensor([0, 3]), 4).shape
        torch.Size([2, 2, 2])
    """
    rates = _ROTARY_BASE ** -(torch.arange(0, width, 2, device=places.device) / width)
    angles = places.float()[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the pairs ``(x_k, x_{k + width/2})`` of vectors, ``(…, T, width)``; the precision stays."""
    cos, sin = turns.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


# --- keys and values -----------------------------------------------------------------------------------------------


class Cache:
    """Keys and values of the tokens that a decoder has seen.

    Attributes:
        length: Number of these tokens.

    Example:
        >>> model, tokens = Decoder(65).eval(), torch.randint(0, 65, (2, 9))
        >>> cache = Cache()
        >>> parts = [model(part, cache) for part in (tokens[:, :5], tokens[:, 5:])]
        >>> torch.allclose(torch.cat(parts, dim=1), model(tokens), atol=1e-5)
        True
    """

    def __init__(self) -> None:
        self.length = 0
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def of_block(self, number: int) -> "Past":
        """The part of one block."""
        return Past(self, number)


@dataclass
class Past:
    """Keys and values of one block."""

    cache: Cache
    number: int

    @property
    def length(self) -> int:
        """Number of tokens that came before."""
        return self.cache.length

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values so far, with those of new tokens added, ``(N, heads, S, width)``."""
        blocks = self.cache._blocks
        if self.number in blocks:
            before = blocks[self.number]
            key, value = (
                torch.cat([old[:, :, : self.length], new], dim=2) for old, new in zip(before, (key, value), strict=True)
            )
        blocks[self.number] = key, value
        return key, value
