"""Layers of a language model by its parts, each part dense or made of cores of its own format and rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal, Self, TypeAlias, TypeVar, cast, get_args

from torch import nn

from tenzoo.factorizations import Factorization, Rank
from tenzoo.factorizations.init import init_cores_
from tenzoo.layers import Implementation, TensorizedEmbedding, TensorizedLinear
from tenzoo.layers.implementation import check_implementation

Part: TypeAlias = Literal["embedding", "attention", "feed_forward", "head"]

L = TypeVar("L", TensorizedLinear, TensorizedEmbedding)

_PARTS = get_args(Part)


@dataclass(frozen=True)
class Parts:
    """Makes the layers of a model, and keeps account of their parameters.

    Args:
        factorization: A format for all parts, or a mapping from parts to formats; what is left out is dense.
        rank: A rank for all parts, or a mapping from parts to ranks.
        implementation: As the layers take it.
        tied: Whether the head is the table of the embedding.

    Raises:
        ValueError: If the settings contradict each other.
    """

    factorization: str | Mapping[Part, str] | None
    rank: Rank | Mapping[Part, Rank] | None
    implementation: Implementation
    tied: bool
    made: list[tuple[Factorization, int]] = field(default_factory=list)
    """The cores of each layer, and the number of parameters of its dense weight."""

    def __post_init__(self) -> None:
        check_implementation(self.implementation)
        for name, value in (("factorization", self.factorization), ("rank", self.rank)):
            for key in value if isinstance(value, Mapping) else ():
                if key not in _PARTS or (key == "head" and self.tied):
                    parts = [part for part in _PARTS if part != "head" or not self.tied]
                    hint = "; a tied head has the cores of the embedding" if key == "head" else ""
                    raise ValueError(f"expected parts of {parts} in `{name}`, got {key!r}{hint}")
        if self.factorization is None and self.rank is not None:
            raise ValueError(f"expected a `factorization` with `rank`, got {self.rank!r} without one")
        if isinstance(self.factorization, Mapping) and isinstance(self.rank, Mapping):
            for part in self.factorization.keys() ^ self.rank.keys():
                raise ValueError(
                    f"expected the same parts in `factorization` and `rank`, got {part!r} in one of them alone"
                )

    def _settings(self, part: Part) -> dict[str, Any] | None:
        """The arguments of the layers of a part; None for dense ones."""
        whole = self.factorization
        name = whole.get(part) if isinstance(whole, Mapping) else whole
        if name is None:
            return None
        rank = self.rank.get(part) if isinstance(self.rank, Mapping) else self.rank
        if rank is None:
            raise ValueError(f"expected a `rank` or a `budget` with `factorization`, got none for the {part}")
        return {"factorization": name, "rank": rank, "implementation": self.implementation}

    def linear(self, part: Part, name: str, in_features: int, out_features: int, std: float) -> nn.Linear:
        """A linear layer without a bias.

        Args:
            part: What it belongs to.
            name: Of the layer, for errors.
            in_features: As in torch.
            out_features: As in torch.
            std: Standard deviation of the weight at the start.
        """
        settings = self._settings(part)
        if settings is None:
            layer = nn.Linear(in_features, out_features, bias=False)
            init_cores_([layer.weight], std)
            return layer
        cores = self._made(name, TensorizedLinear, in_features, out_features, settings | {"bias": False})
        self._draw(cores, std, in_features * out_features)
        return cores

    def embedding(self, num_tokens: int, width: int) -> nn.Embedding:
        """The table of tokens, with entries of variance ``1/width``."""
        settings = self._settings("embedding")
        if settings is None:
            layer = nn.Embedding(num_tokens, width)
            init_cores_([layer.weight], width**-0.5)
            return layer
        cores = self._made("embedding", TensorizedEmbedding, num_tokens, width, settings)
        self._draw(cores, width**-0.5, num_tokens * width)
        return cores

    def head(self, embedding: nn.Embedding) -> nn.Linear:
        """A layer to the logits, which has the weight or the cores of the embedding if they are tied.

        The factors of the rows may multiply to more than the number of tokens: the logits beyond it mean nothing.
        """
        num_tokens, width = embedding.num_embeddings, embedding.embedding_dim
        if not self.tied:
            return self.linear("head", "head", width, num_tokens, width**-0.5)
        if not isinstance(embedding, TensorizedEmbedding):
            layer = nn.Linear(width, num_tokens, bias=False, device="meta")
            layer.weight = embedding.weight
            return layer
        rows = embedding.tensorization[0]
        settings = cast(dict[str, Any], self._settings("embedding")) | {"rank": list(embedding.factorization.rank)}
        cores = TensorizedLinear(
            width, math.prod(rows), bias=False, tensorization=embedding.tensorization, device="meta", **settings
        )
        cores.factorization = embedding.factorization
        return cores

    @staticmethod
    def _made(name: str, kind: type[L], first: int, second: int, settings: dict[str, Any]) -> L:
        """A layer of two sizes; one number as the rank of all bonds is cut to what each can use."""
        rank = settings["rank"]
        try:
            if isinstance(rank, Integral) and not isinstance(rank, bool):
                empty = kind(first, second, device="meta", **settings).factorization
                settings = settings | {"rank": list(empty.clipped_rank(empty.shape, empty.rank))}
            return kind(first, second, **settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} in {name}") from error

    def _draw(self, layer: TensorizedLinear | TensorizedEmbedding, std: float, num_dense: int) -> None:
        layer.factorization.init_std = std
        layer.reset_parameters()
        self.made.append((layer.factorization, num_dense))

    def with_rank(self, rank: Rank) -> Self:
        """The same with another rank, and nothing made yet."""
        return replace(self, rank=rank, made=[])

    def rank_within(self, budget: int | float, total: int) -> int:
        """The largest rank of all layers of cores with which the model keeps to a budget.

        Args:
            budget: A number of parameters, or a fraction of those of the dense model.
            total: Number of parameters of the model with the layers that were made.

        Raises:
            TypeError: If the budget is no number.
            ValueError: If it is out of range, or too small for rank one.
        """
        if isinstance(budget, bool) or not isinstance(budget, Real):
            raise TypeError(f"expected a number of parameters or a fraction in `budget`, got {budget!r}")
        others = total - sum(core.numel() for cores, _ in self.made for core in cores.cores)
        dense = others + sum(number for _, number in self.made)
        if not (budget >= 1 if isinstance(budget, Integral) else 0 < budget <= 1):
            raise ValueError(f"expected an int >= 1 or a float in (0, 1] in `budget`, got {budget!r}")
        allowed = float(budget) * (1 if isinstance(budget, Integral) else dense)

        def number(rank: int) -> int:
            return others + sum(
                cores.num_parameters(cores.shape, cores.clipped_rank(cores.shape, rank)) for cores, _ in self.made
            )

        if number(1) > allowed:
            raise ValueError(
                f"expected at least {number(1):,} in `budget`, the parameters with rank 1, got {math.floor(allowed):,}"
            )
        rank = 1
        while number(2 * rank) <= allowed and number(2 * rank) > number(rank):
            rank *= 2
        step = rank
        while step := step // 2:
            rank += step if number(rank + step) <= allowed else 0
        return rank
