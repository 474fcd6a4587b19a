import numpy as np
import pytest
import torch

from tenzoo.data.loader import Share
from tenzoo.data.text.batches import GROUPED_BATCHES, Padding, SequentialTextLoader, TextLoader, Texts, pad_texts
from tenzoo.data.text.tokens import Tokens


def make_texts(count: int, *, longest: int = 60, seed: int = 0) -> Texts:
    """The label is the number of the text, and each of its tokens too."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, size=count)
    tokens = [[number + 1] * length for number, length in enumerate(lengths)]
    return Texts(Tokens.join(tokens), torch.arange(count))


def lengths_of(batch) -> list[int]:
    return batch["attention_mask"].sum(1).tolist()


@pytest.mark.parametrize("left", [False, True])
def test_padding_by_hand(left):
    tokens = Tokens.join([[5, 6, 7], [8], [9, 3]], [[0, 1, 1], [0], [1, 0]])
    batch = pad_texts(Texts(tokens), torch.tensor([2, 0, 1]), Padding(99, 7, left))
    if left:
        assert batch["input_ids"].tolist() == [[99, 9, 3], [5, 6, 7], [99, 99, 8]]
        assert batch["token_type_ids"].tolist() == [[7, 1, 0], [0, 1, 1], [7, 7, 0]]
        assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    else:
        assert batch["input_ids"].tolist() == [[9, 3, 99], [5, 6, 7], [8, 99, 99]]
        assert batch["token_type_ids"].tolist() == [[1, 0, 7], [0, 1, 1], [0, 7, 7]]
        assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert list(batch) == ["input_ids", "attention_mask", "token_type_ids"]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_chosen_text_keeps_its_tokens_and_label():
    texts = make_texts(30).take(torch.tensor([29, 3, 3, 11]))
    (batch,) = SequentialTextLoader(texts, Padding(0), batch_size=9)
    assert batch["labels"].tolist() == [29, 3, 3, 11]
    assert batch["input_ids"].max(1).values.tolist() == [30, 4, 4, 12]
    assert lengths_of(batch) == [make_texts(30).tokens.lengths[row] for row in (29, 3, 3, 11)]


@pytest.mark.parametrize(("count", "batch_size"), [(11, 4), (12, 4), (3, 8), (1000, 7), (1, 1)])
def test_each_epoch_has_every_text_once_and_the_small_batch_last(count, batch_size):
    loader = TextLoader(make_texts(count), Padding(0), batch_size=batch_size, seed=2)
    orders = []
    for _ in range(3):
        batches = list(loader)
        sizes = [len(batch["labels"]) for batch in batches]
        assert len(batches) == len(loader)
        assert set(sizes[:-1]) <= {batch_size}
        orders.append([label for batch in batches for label in batch["labels"].tolist()])
        assert sorted(orders[-1]) == list(range(count))
        for batch in batches:
            assert torch.equal(batch["input_ids"].max(1).values, batch["labels"] + 1)
    assert count <= 3 or len(set(map(tuple, orders))) == 3


def test_batches_have_similar_lengths_in_no_order():
    texts = make_texts(4000)
    batches = list(TextLoader(texts, Padding(0), batch_size=8))
    padded = sum((1 - batch["attention_mask"]).sum().item() for batch in batches)
    assert padded < 0.03 * len(texts.tokens.ids)  # without groups about 75 % as many as there are tokens
    means = np.array([np.mean(lengths_of(batch)) for batch in batches])
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.15


def test_texts_of_one_length_are_shuffled_all_the_same():
    count = 300
    same = Texts(Tokens.join([[1]] * count), torch.arange(count))
    batches = [
        {frozenset(batch["labels"].tolist()) for batch in TextLoader(same, Padding(0), batch_size=4, seed=seed)}
        for seed in (0, 1)
    ]
    assert len(batches[0] & batches[1]) == 0


def test_the_last_batch_is_of_any_length():
    """Its text is as long on average as all: it is not what sorting leaves over."""
    texts, lengths = make_texts(4 * GROUPED_BATCHES + 1), []
    for seed in range(300):
        loader = TextLoader(texts, Padding(0), batch_size=4, seed=seed)
        loader.load_state_dict({"permutation": 0, "batch": GROUPED_BATCHES})
        lengths += lengths_of(next(iter(loader)))
    mean, deviation = texts.tokens.lengths.mean(), texts.tokens.lengths.std()
    assert len(lengths) == 300
    assert abs(np.mean(lengths) - mean) < 4 * deviation / 300**0.5


def test_batches_depend_on_seed_and_place_alone():
    def stream(seed):
        loader = TextLoader(make_texts(50), Padding(0), batch_size=8, seed=seed)
        return [batch["input_ids"].tolist() for _ in range(2) for batch in loader]

    first = stream(1)
    torch.manual_seed(5)
    assert stream(1) == first
    assert stream(2) != first


@pytest.mark.parametrize("consumed", range(9))
def test_state_resumes_anywhere(consumed):
    texts = make_texts(30)
    loader = TextLoader(texts, Padding(0), batch_size=8, seed=3)
    stream = [batch["labels"].tolist() for _ in range(4) for batch in loader]
    stopped = TextLoader(texts, Padding(0), batch_size=8, seed=3)
    for _ in range(consumed):
        next(iter(stopped))
    resumed = TextLoader(texts, Padding(0), batch_size=8, seed=3)
    resumed.load_state_dict(stopped.state_dict())
    rest = [batch["labels"].tolist() for _ in range(2) for batch in resumed]
    assert rest == stream[consumed : consumed + 8]


@pytest.mark.parametrize("world_size", [2, 3, 11])
def test_processes_share_each_batch(world_size):
    texts = make_texts(45)
    whole = list(TextLoader(texts, Padding(0), batch_size=10, seed=4))
    loaders = [
        TextLoader(texts, Padding(0), batch_size=10, seed=4, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for batch, *shares in zip(whole, *loaders, strict=True):
        assert all(isinstance(share, Share) for share in shares)
        assert sum(share.weight for share in shares) == pytest.approx(world_size)
        own = [label for share in shares if share.weight for label in share.batch["labels"].tolist()]
        assert sorted(own) == sorted(batch["labels"].tolist())
        for share in shares:
            assert len(share.batch["labels"]) >= 1
            assert share.weight in (0, len(share.batch["labels"]) * world_size / len(batch["labels"]))
