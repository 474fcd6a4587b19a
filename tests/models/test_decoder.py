"""The decoder: what it computes, with cores as without, and what it refuses."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tenzoo.cores import find_core_groups
from tenzoo.models import Decoder
from tenzoo.models.decoder import Cache, rotated, rotations
from tests.factorizations.formats import NAMES

SMALL = {"width": 24, "depth": 2, "heads": 4, "context": 16}
TOKENS = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(0))
VARIANTS = {
    "modern": {},
    "shared keys": {"kv_heads": 2},
    "one key": {"kv_heads": 1},
    "classic": {"norm": "layer", "positions": "learned", "activation": "gelu"},
    "untied": {"tied": False},
}


def model(factorization=None, **settings):
    torch.manual_seed(0)
    cores = {} if factorization is None else {"factorization": factorization, "rank": 3}
    return Decoder(11, **{**SMALL, **cores, **settings}).eval()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def by_hand(decoder, tokens):
    """The logits, from formulas, one position and one head at a time, in double precision."""
    own = decoder.architecture
    weights = {name: value.double() for name, value in decoder.state_dict().items()}

    def normalized(x, name):
        if own.norm == "rms":
            return (
                x
                / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
                * weights[f"{name}.weight"]
            )
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def turned(x, place):
        if own.positions != "rotary":
            return x
        pairs = torch.complex(x[: len(x) // 2].contiguous(), x[len(x) // 2 :].contiguous())
        rates = torch.tensor([10_000 ** (-2 * k / len(x)) for k in range(len(x) // 2)], dtype=torch.float64)
        pairs = pairs * torch.polar(torch.ones_like(rates), place * rates)
        return torch.cat([pairs.real, pairs.imag])

    x = weights["embedding.weight"][tokens]
    if own.positions == "learned":
        x = x + weights["positions.weight"][: len(tokens)]
    size = own.head_width
    for k in range(own.depth):
        y = normalized(x, f"blocks.{k}.attention_norm")
        name = f"blocks.{k}.attention"
        query, key, value = (y @ weights[f"{name}.{each}.weight"].t() for each in ("query", "key", "value"))
        found = torch.zeros_like(x)
        for head in range(own.heads):
            shared = head // (own.heads // own.kv_heads)
            for place in range(len(tokens)):
                own_query = turned(query[place, head * size : (head + 1) * size], place)
                scores = torch.stack(
                    [own_query @ turned(key[j, shared * size : (shared + 1) * size], j) for j in range(place + 1)]
                )
                attention = (scores / math.sqrt(size)).softmax(0)
                found[place, head * size : (head + 1) * size] = (
                    attention @ value[: place + 1, shared * size : (shared + 1) * size]
                )
        x = x + found @ weights[f"{name}.output.weight"].t()
        y, name = normalized(x, f"blocks.{k}.feed_forward_norm"), f"blocks.{k}.feed_forward"
        inner = y @ weights[f"{name}.inner.weight"].t()
        if own.activation == "swiglu":
            gate = y @ weights[f"{name}.gate.weight"].t()
            inner = gate / (1 + (-gate).exp()) * inner
        else:
            inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = x + inner @ weights[f"{name}.output.weight"].t()
    return normalized(x, "norm") @ weights["head.weight"].t()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_formulas(variant):
    decoder = model(**VARIANTS[variant])
    with torch.no_grad():
        found = decoder.double()(TOKENS)
    expected = torch.stack([by_hand(decoder, row) for row in TOKENS])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # angles are in single precision


@pytest.mark.sampled(5)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_dense_twin_has_the_same_logits(name, variant):
    decoder = model(name, **VARIANTS[variant])
    dense = decoder.to_dense()
    assert not find_core_groups(dense)
    with torch.no_grad():
        torch.testing.assert_close(dense(TOKENS), decoder(TOKENS), atol=1e-5, rtol=1e-5)
    assert not dense.training
    assert (dense.head.weight is dense.embedding.weight) == decoder.tied


@pytest.mark.parametrize("name", [None, "tt", "btt"])
def test_no_position_sees_a_later_one(name):
    decoder = model(name)
    other = TOKENS.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    with torch.no_grad():
        one, two = decoder(TOKENS), decoder(other)
    torch.testing.assert_close(one[:, :5], two[:, :5])
    assert (one[:, 5:] - two[:, 5:]).abs().amax() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [None, "tt"])
@pytest.mark.parametrize("parts", [[9], [1] * 9, [4, 5], [3, 1, 5]])
def test_parts_with_a_cache_are_the_whole(parts, name, variant):
    decoder, cache = model(name, **VARIANTS[variant]), Cache()
    with torch.no_grad():
        found = torch.cat([decoder(part, cache) for part in TOKENS.split(parts, dim=1)], dim=1)
        torch.testing.assert_close(found, decoder(TOKENS), atol=1e-5, rtol=1e-5)
    assert cache.length == 9


def test_rotations_see_distances_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 8)
    turns = rotations(torch.arange(20), 8)
    query, key = (rotated(x.expand(20, 8), turns) for x in (query, key))
    products = query @ key.t()
    for distance in (0, 3, 7):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert query.square().sum(1) == pytest.approx([float(query[0].square().sum())] * 20, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_tied_head_has_the_cores_of_the_embedding(name):
    decoder = model(name)
    groups = find_core_groups(decoder)
    assert sum("embedding" in group.name or "head" in group.name for group in groups) == 1
    cores = [core for group in groups for core in group.cores]
    assert len({id(core) for core in cores}) == len(cores)
    untied = model(name, tied=False)
    assert count(decoder) == count(untied) - sum(core.numel() for core in untied.head.factorization.cores)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_tied_cores_is_the_sum_of_both_uses(name):
    decoder = model(name).double()
    apart = copy.deepcopy(decoder)
    apart.head.factorization = copy.deepcopy(decoder.embedding.factorization)
    for each in (decoder, apart):
        F.cross_entropy(each(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    for core, one, other in zip(
        decoder.embedding.factorization.cores,
        apart.embedding.factorization.cores,
        apart.head.factorization.cores,
        strict=True,
    ):
        torch.testing.assert_close(core.grad, one.grad + other.grad)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [None, *NAMES])
def test_scales_at_the_start(name):
    """Weights have the variances that are promised, whatever they are made of."""
    torch.manual_seed(0)
    found = {"query": [], "output": [], "embedding": []}
    for _ in range(8):
        cores = {} if name is None else {"factorization": name, "rank": 6}
        decoder = Decoder(60, width=64, depth=2, **cores)
        found["query"] += [block.attention.query.weight.detach().square().mean() for block in decoder.blocks]
        found["output"] += [block.feed_forward.output.weight.detach().square().mean() for block in decoder.blocks]
        found["embedding"].append(decoder.embedding.weight.detach().square().mean())
    hidden = decoder.architecture.hidden_width
    for part, variance in (("query", 1 / 64), ("output", 1 / hidden / 4), ("embedding", 1 / 64)):
        mean = float(torch.stack(found[part]).mean())
        assert mean == pytest.approx(variance, rel=0.02 if name is None else 0.5), part


def test_parts_have_formats_and_ranks_of_their_own():
    decoder = model(
        factorization={"attention": "cp", "feed_forward": "tt"}, rank={"attention": 2, "feed_forward": [3, 3, 3, 3, 3]}
    )
    names = {group.name.split(".", 2)[-1].removesuffix(".weight") for group in find_core_groups(decoder)}
    assert names == {
        *(f"attention.{each}" for each in ("query", "key", "value", "output")),
        *(f"feed_forward.{each}" for each in ("inner", "gate", "output")),
    }
    assert decoder.blocks[0].attention.query.factorization.name == "cp"
    assert isinstance(decoder.embedding, nn.Embedding)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", NAMES)
def test_a_budget_is_kept_and_used(name):
    whole = count(model())
    decoder = model(factorization=name, rank=None, budget=0.5)
    assert count(decoder) <= whole / 2
    numbers = [count(model(factorization=name, rank=rank)) for rank in range(1, 30)]
    fitting = [number for number in numbers if number <= whole / 2]
    assert count(decoder) == max(fitting)
    assert count(model(factorization=name, rank=None, budget=max(fitting))) == max(fitting)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 25}, r"a divisor of the width 25 in `heads`, got 4"),
        ({"kv_heads": 3}, r"a divisor of the 4 heads in `kv_heads`, got 3"),
        ({"heads": 8}, r"an even width for rotary positions, got 8 in `heads` of the width 24, 3 each"),
        ({"norm": "batch"}, r"one of \['layer', 'rms'\] in `norm`, got 'batch'"),
        ({"positions": None}, r"one of \['learned', 'rotary'\] in `positions`, got None"),
        ({"activation": "relu"}, r"in `activation`, got 'relu'"),
        ({"dropout": 1.0}, r"a number in \[0, 1\) in `dropout`, got 1.0"),
        ({"depth": 0}, r"an int >= 1 in `depth`, got 0"),
        ({"context": 0}, r"an int >= 1 in `context`, got 0"),
        ({"rank": 4}, r"a `factorization` with `rank`, got 4 without one"),
        ({"factorization": "tt"}, r"a `rank` or a `budget` with `factorization`, got none for the embedding"),
        ({"factorization": "ttt", "rank": 2}, r"'ttt'.* in embedding"),
        ({"factorization": {"mlp": "tt"}, "rank": 2}, r"in `factorization`, got 'mlp'"),
        ({"factorization": {"head": "tt"}, "rank": 2}, r"got 'head'; a tied head has the cores of the embedding"),
        (
            {"factorization": {"attention": "tt"}, "rank": {"feed_forward": 2}},
            r"the same parts in `factorization` and `rank`, got '(attention|feed_forward)' in one of them alone",
        ),
        ({"factorization": {"attention": "tt"}, "rank": [3, 3]}, r"in blocks.0.attention.query"),
        ({"budget": 1000}, r"a `factorization` and no `rank` with `budget`, got no `factorization`"),
        ({"factorization": "tt", "rank": 2, "budget": 0.5}, r"got the `rank` 2 as well"),
        ({"factorization": "tt", "budget": 100}, r"at least [\d,]+ in `budget`, the parameters with rank 1, got 100"),
        ({"factorization": "tt", "budget": 1.5}, r"an int >= 1 or a float in \(0, 1\] in `budget`, got 1.5"),
        ({"factorization": "tt", "budget": "half"}, r"a number of parameters or a fraction in `budget`, got 'half'"),
        ({"implementation": "fast"}, r"in `implementation`, got 'fast'"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Decoder(11, **{**SMALL, **settings})


def test_tokens_that_do_not_fit():
    decoder = model()
    with pytest.raises(ValueError, match=r"shape \(N, T\) in `tokens`, got \(9,\)"):
        decoder(TOKENS[0])
    with pytest.raises(ValueError, match="at most 16 tokens, the context, in `tokens`, got 18"):
        decoder(TOKENS.repeat(1, 2))
    cache = Cache()
    decoder(TOKENS, cache)
    with pytest.raises(ValueError, match="at most 16 tokens, the context, in `tokens`, got 18"):
        decoder(TOKENS, cache)


@pytest.mark.parametrize("name", [None, "tt"])
def test_half_precision_and_autocast(name):
    decoder = model(name)
    with torch.no_grad():
        expected = decoder(TOKENS)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(decoder(TOKENS).float(), expected, atol=0.1, rtol=0.1)
        torch.testing.assert_close(decoder.bfloat16()(TOKENS).float(), expected, atol=0.2, rtol=0.2)
