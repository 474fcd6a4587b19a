"""The task of language models: its numbers are those of all tokens, whatever the batches."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor
from tenzoo.data import TextCorpusDataModule
from tenzoo.models import Decoder
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
    expected = loss / math.log(2) * (len(tokens) - 1) / len(tokens)
    assert found["val/bits_per_character"] == pytest.approx(expected, rel=1e-5)


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
