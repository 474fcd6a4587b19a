"""The task of language models: its numbers are those of all tokens, whatever the batches."""

import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor
from tenzoo.data import TextCorpusDataModule
from tenzoo.models import Decoder
from tenzoo.models.generation import Continuation
from tenzoo.prediction import ContinuationsWriter
from tenzoo.tasks import SAM, CausalLMTask
from tests.data.running_text.test_corpus import TEXT

SMALL = {"width": 16, "depth": 1, "heads": 2, "context": 16}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def data(file, **settings):
    return TextCorpusDataModule(file, **{"context": 16, "batch_size": 8, "eval_batch_size": 3, **settings})


def task(num_tokens=30, factorization=None, **settings):
    torch.manual_seed(0)
    cores = {} if factorization is None else {"factorization": factorization, "rank": 3}
    network = Decoder(num_tokens, **SMALL, **cores)
    return CausalLMTask(network, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), **settings)


@pytest.mark.parametrize("stride", [None, 5])
def test_metrics_are_those_of_all_tokens(file, stride):
    module, corpus = task(), data(file, stride=stride)
    found = Trainer(**QUIET).validate(module, corpus, verbose=False)[0]
    tokens = torch.from_numpy(corpus.splits["val"].tokens).long()
    losses, right = [], []
    step = stride or 16
    starts = [*range(0, len(tokens) - 17, step), len(tokens) - 17]
    done = 0
    with torch.no_grad():
        for start in starts:
            logits = module.network.eval()(tokens[start : start + 16][None])[0]
            new = slice(max(done - start, 0), 16)
            targets = tokens[start + 1 : start + 17]
            losses.append(F.cross_entropy(logits[new], targets[new], reduction="none"))
            right.append((logits[new].argmax(1) == targets[new]).double())
            done = start + 16
    loss = float(torch.cat(losses).double().mean())
    assert len(torch.cat(losses)) == len(tokens) - 1
    assert found["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["val/accuracy"] == pytest.approx(float(torch.cat(right).mean()), rel=1e-6)
    assert found["val/bits_per_character"] == pytest.approx(loss / math.log(2), rel=1e-5)


def test_batches_of_another_size_give_the_same(file):
    one, other = (
        Trainer(**QUIET).test(task(), data(file, stride=7, eval_batch_size=size), verbose=False)[0] for size in (1, 64)
    )
    assert (
        one.keys()
        == other.keys()
        == {f"test/{name}" for name in ("loss", "accuracy", "perplexity", "bits_per_character")}
    )
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["plain", "das", "sam"])
def test_a_decoder_of_cores_learns(file, method):
    corpus = data(file)
    module = task(factorization="tt", sam=SAM(rho=0.05) if method == "sam" else None)
    callbacks = [NormDynamicsMonitor()] + ([DeviationAwareScaling(alpha=0.1)] if method == "das" else [])
    before = Trainer(**QUIET).validate(module, corpus, verbose=False)[0]["val/loss"]
    trainer = Trainer(**QUIET, max_epochs=6, callbacks=callbacks, log_every_n_steps=1)
    trainer.fit(module, corpus)
    assert trainer.callback_metrics["val/loss"] < 0.8 * before
    assert 0 < trainer.callback_metrics["train/accuracy"] < 1


def test_bits_of_byte_pairs_are_those_of_characters(file):
    pytest.importorskip("tokenizers", reason="pip install 'tenzoo[text]'")
    corpus = data(file, tokenizer="bpe", vocabulary_size=280, context=8)
    corpus.setup()
    found = Trainer(**QUIET).validate(task(corpus.num_tokens), corpus, verbose=False)[0]
    text = corpus.splits["val"]
    expected = found["val/loss"] / math.log(2) * (len(text.tokens) - 1) / text.characters
    assert found["val/bits_per_character"] == pytest.approx(expected, rel=1e-5)


def test_another_vocabulary_is_refused(file):
    with pytest.raises(ValueError, match=r"expected 30 in `num_tokens` of the network, as in the data, got 65"):
        Trainer(**QUIET, max_epochs=1).fit(task(65), data(file))


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(30, 30)

    def forward(self, tokens):
        return self.layer(tokens).mean(1)


def test_logits_of_another_shape_are_refused(file):
    with pytest.raises(
        ValueError, match=r"logits of shape \(N, T, num_tokens\) from `network` for \(N, T\) = \(\d, 16\)"
    ):
        Trainer(**QUIET, max_epochs=1).fit(CausalLMTask(Wrong()), data(file))


def test_a_network_of_the_users_own(file):
    """One that gives its logits as the models of transformers do."""

    class Bigrams(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Embedding(30, 30)

        def forward(self, tokens):
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.layer(tokens))

    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(CausalLMTask(Bigrams()), data(file))
    assert trainer.callback_metrics["val/perplexity"] > 1


# --- prediction ----------------------------------------------------------------------------------------------------


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predicted(file, folder, settings, number, **more):
    module = task(number, continuation=Continuation(**{"length": 12, "seed": 3, **settings}), **more)
    trainer = Trainer(**QUIET, default_root_dir=folder, callbacks=[ContinuationsWriter()])
    prompts = folder / "prompts.txt"
    prompts.write_text('The\nsun, "and"\nthe')
    corpus = data(file, predict=str(prompts))
    corpus.setup("predict")
    trainer.predict(module, corpus, return_predictions=False)
    return (
        module.network,
        corpus.vocabulary,
        read(max(folder.glob("continuations*.csv"), key=lambda path: path.stat().st_mtime_ns)),
    )


@pytest.fixture
def words(file):
    """The text with all characters of the prompts, and its number of tokens."""
    path = Path(file)
    path.write_text('The sun, "and"\n' + path.read_text())
    corpus = data(file)
    corpus.setup("fit")
    return corpus.num_tokens


def test_prompts_are_continued_as_the_model_alone_continues_them(file, tmp_path, words):
    network, vocabulary, rows = predicted(file, tmp_path, {"temperature": 0}, words)
    assert [row["prompt"] for row in rows] == ["The", 'sun, "and"', "the"]
    for row in rows:
        tokens = torch.from_numpy(vocabulary.encode(row["prompt"], arg="prompt")).long()[None]
        for _ in range(12):
            with torch.no_grad():
                logits = network.eval()(tokens[:, -16:])
            if tokens.shape[1] < 16:  # the context: beyond it the cache goes on from the last half
                assert (
                    vocabulary.decode(logits[0, -1].argmax()[None].tolist())
                    == row["continuation"][tokens.shape[1] - len(row["prompt"])]
                )
            tokens = torch.cat([tokens, logits[:, -1].argmax(-1)[None]], dim=1)
        assert len(row["continuation"]) == 12


def test_each_prompt_has_random_numbers_of_its_own_seed(file, tmp_path, words):
    first, again, other = (
        [row["continuation"] for row in predicted(file, tmp_path, {"seed": seed}, words)[2]] for seed in (3, 3, 4)
    )
    assert first == again != other
    assert len(list(tmp_path.glob("continuations*.csv"))) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, r"^expected an int from 1 to 2\^63 - 1 in `length`, got 0$"),
        ({"seed": -1}, r"^expected an int from 0 to 2\^63 - 1 in `seed`, got -1$"),
        ({"seed": 2**64}, r"^expected an int from 0 to 2\^63 - 1 in `seed`, got 18446744073709551616$"),
        ({"length": True}, r"^expected an int from 1 to 2\^63 - 1 in `length`, got True$"),
        ({"temperature": -1.0}, r"^expected a finite number >= 0 in `temperature`, got -1\.0$"),
    ],
)
def test_bad_settings_of_a_continuation(settings, message):
    with pytest.raises(ValueError, match=message):
        Continuation(**settings)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, r"^expected a file of prompts in `predict`, got None"),
        ("The\n\nsun\n", r"^expected a prompt in each line in `predict`, got an empty line 2 in"),
        ("The €", r"in `predict`"),
    ],
)
def test_bad_prompts(file, tmp_path, words, prompts, message):
    path = tmp_path / "prompts.txt"
    if prompts is not None:
        path.write_text(prompts)
    corpus = data(file, predict=None if prompts is None else str(path))
    with pytest.raises(ValueError, match=message):
        Trainer(**QUIET).predict(task(words), corpus)


def test_another_network_cannot_continue(file, tmp_path, words):
    (tmp_path / "prompts.txt").write_text("The")
    module = CausalLMTask(nn.Sequential(nn.Embedding(words, 8), nn.Linear(8, words)))
    with pytest.raises(TypeError, match=r"^expected a Decoder in `network` to continue prompts, got Sequential$"):
        Trainer(**QUIET).predict(module, data(file, predict=str(tmp_path / "prompts.txt")))


class Pair(nn.Module):
    """Logits and something else, as many write it."""

    def __init__(self, number, output=lambda logits: (logits, None)):
        super().__init__()
        self.layer, self.output = nn.Embedding(number, number), output

    def forward(self, tokens):
        return self.output(self.layer(tokens))


def test_the_first_of_several_outputs_are_the_logits(file):
    alone, pair = (CausalLMTask(Pair(30, output)) for output in (lambda logits: logits, lambda logits: (logits, None)))
    pair.load_state_dict(alone.state_dict())
    found = [Trainer(**QUIET).validate(each, data(file), verbose=False)[0] for each in (alone, pair)]
    assert found[0] == found[1]
    with pytest.raises(TypeError, match=r"^expected logits as a tensor from `network`, got dict$"):
        Trainer(**QUIET).validate(CausalLMTask(Pair(30, lambda logits: {})), data(file), verbose=False)


def test_a_context_beyond_that_of_the_network_is_refused_before_training(file):
    with pytest.raises(
        ValueError, match=r"^expected at most 16, the context of the network, in `context` of the data, got 17"
    ):
        Trainer(**QUIET, max_steps=1).fit(task(), data(file, context=17))


def test_a_continuation_of_another_type():
    with pytest.raises(TypeError, match=r"^expected a Continuation or None in `continuation`, got dict$"):
        task(continuation={"length": 3})
