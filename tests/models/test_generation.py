"""Generation: with a cache as without one, and tokens drawn as they should be."""

import pytest
import torch

from tenzoo.models import Decoder
from tenzoo.models.generation import Sampling, generate

GREEDY = Sampling(temperature=0)
VARIANTS = {
    "dense": {},
    "trains": {"factorization": "tt", "rank": 3},
    "classic": {"norm": "layer", "positions": "learned", "activation": "gelu", "kv_heads": 2},
}


def model(**settings):
    torch.manual_seed(0)
    return Decoder(29, width=24, depth=2, heads=4, context=16, **settings)


def prompt(length=5, rows=2):
    return torch.randint(0, 29, (rows, length), generator=torch.Generator().manual_seed(1))


def without_cache(decoder, tokens, length):
    """Token by token, the whole context anew each time."""
    context, start = decoder.architecture.context, max(tokens.shape[1] - decoder.architecture.context, 0)
    decoder = decoder.eval()
    first = start
    with torch.no_grad():
        for _ in range(length):
            if tokens.shape[1] - first > context:
                first = tokens.shape[1] - context // 2
            tokens = torch.cat([tokens, decoder(tokens[:, first:])[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens[:, -length:]


@pytest.mark.parametrize("size", [1, 5, 16, 20])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_without_a_cache(variant, size):
    decoder, tokens = model(**VARIANTS[variant]), prompt(size)
    found = torch.stack(list(generate(decoder, tokens, 40, sampling=GREEDY)), dim=1)
    assert found.equal(without_cache(decoder, tokens, 40))


def test_the_mode_is_as_before():
    decoder = model(dropout=0.5)
    stream = generate(decoder, prompt(), 4, sampling=GREEDY)
    next(stream)
    assert decoder.training
    assert all(module.training for module in decoder.modules())
    one, other = ([token.tolist() for token in generate(decoder, prompt(), 4, sampling=GREEDY)] for _ in range(2))
    assert one == other


def test_modules_of_other_modes_keep_theirs():
    decoder = model(dropout=0.5)
    decoder.blocks[0].eval()
    before = [module.training for module in decoder.modules()]
    list(generate(decoder, prompt(), 2))
    assert [module.training for module in decoder.modules()] == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_numbers_of_others_stay(variant):
    decoder, before = model(**VARIANTS[variant]), torch.get_rng_state()
    list(generate(decoder, prompt(), 3, generator=torch.Generator()))
    assert torch.get_rng_state().equal(before)


def test_hooks_and_layers_of_others_act_in_generation():
    """The dense copy that saves time has none of them, so it is not taken."""
    decoder, tokens, seen = model(factorization="tt", rank=3), prompt(), []
    before = torch.stack(list(generate(decoder, tokens, 8, sampling=GREEDY)))
    decoder.blocks[0].register_forward_hook(lambda block, inputs, output: seen.append(output.shape))
    assert torch.stack(list(generate(decoder, tokens, 8, sampling=GREEDY))).equal(before)
    assert len(seen) == 8

    class Zero(torch.nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    decoder.blocks[0].feed_forward = Zero()
    found = torch.stack(list(generate(decoder, tokens, 8, sampling=GREEDY)), dim=1)
    assert found.equal(without_cache(decoder, tokens, 8))


def test_layers_that_contract_are_not_rebuilt(monkeypatch):
    decoder, tokens = model(factorization="tt", rank=3), prompt()
    expected = torch.stack(list(generate(decoder, tokens, 12, sampling=GREEDY)))
    contracting = model(factorization="tt", rank=3, implementation="contract")
    monkeypatch.setattr(Decoder, "to_dense", None)
    assert torch.stack(list(generate(contracting, tokens, 12, sampling=GREEDY))).equal(expected)


def test_a_seed_gives_the_same_tokens():
    found = [
        torch.stack(list(generate(model(), prompt(), 12, generator=torch.Generator().manual_seed(seed))))
        for seed in (0, 0, 1)
    ]
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    sampling = Sampling(temperature=2.0)
    drawn = sampling.draw(logits.expand(20_000, 4), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, (logits / 2).softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 9}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
    ],
)
def test_which_tokens_are_drawn_from(settings, expected):
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    found = Sampling(**settings).probabilities(logits[order][None])[0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32)[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "a finite number >= 0 in `temperature`, got -1.0"),
        ({"temperature": float("nan")}, "in `temperature`, got nan"),
        ({"top_k": 0}, "an int >= 1 or None in `top_k`, got 0"),
        ({"top_p": 0.0}, r"a number in \(0, 1\] in `top_p`, got 0.0"),
        ({"top_p": 1.5}, "in `top_p`, got 1.5"),
    ],
)
def test_sampling_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**settings)


def test_prompts_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shape \(N, T\), at least one, in `prompt`, got \(1, 0\)"):
        generate(model(), torch.zeros(1, 0, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="an int >= 0 in `length`, got -1"):
        generate(model(), prompt(), -1)
    assert list(generate(model(), prompt(), 0)) == []


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 1e300])
def test_extreme_temperatures(temperature):
    drawn = Sampling(temperature=temperature).probabilities(torch.tensor([[1.0, 3.0, 2.0]]))
    expected = [[0.0, 1.0, 0.0]] if temperature < 1 else [[1 / 3] * 3]
    torch.testing.assert_close(drawn, torch.tensor(expected))


@pytest.mark.parametrize("settings", [{"top_k": 2.5}, {"top_k": "a"}, {"top_p": True}, {"temperature": "x"}])
def test_settings_of_other_types(settings):
    (name,) = settings
    with pytest.raises(TypeError, match=rf"^expected .* in `{name}`, got"):
        Sampling(**settings)
