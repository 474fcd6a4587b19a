"""Running text: what is read, how it is cut into blocks and windows, and that blocks resume exactly."""

import copy
import json

import numpy as np
import pytest
import torch

from tenzoo.data import BlockLoader, TextCorpusDataModule, WindowLoader
from tenzoo.data.corpus.blocks import IGNORED
from tenzoo.data.corpus.vocabulary import Characters, vocabulary_of

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 40


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def data(source, **settings):
    module = TextCorpusDataModule(source, **{"context": 16, "batch_size": 4, **settings})
    module.setup()
    return module


# --- blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [9, 16, 17, 18, 40, 100, 999])
def test_blocks_of_a_permutation_follow_each_other(length):
    tokens = np.arange(length, dtype=np.int32)
    loader = BlockLoader(tokens, context=8, batch_size=3)
    for _ in range(3):
        blocks = [row for batch in loader for row in batch["tokens"]]
        starts = sorted(int(row[0]) for row in blocks)
        assert np.diff(starts).tolist() == [8] * (len(starts) - 1)
        assert all(row.tolist() == [*range(int(row[0]), int(row[0]) + 8)] for row in blocks)
        assert starts[0] >= 0
        assert starts[-1] + 8 < length


def test_targets_are_the_next_tokens():
    tokens = np.random.default_rng(0).integers(0, 50, 200).astype(np.int32)
    for batch in BlockLoader(tokens, context=8, batch_size=3):
        assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
        assert batch["tokens"][:, 1:].equal(batch["targets"][:, :-1])


def test_blocks_begin_elsewhere_in_the_next_permutation():
    loader = BlockLoader(np.arange(1000, dtype=np.int32), context=8, batch_size=200)
    starts = [int(next(iter(loader))["tokens"].min()) % 8 for _ in range(12)]
    assert len(set(starts)) > 3


def test_all_tokens_come_up():
    loader = BlockLoader(np.arange(50, dtype=np.int32), context=8, batch_size=4)
    seen = {int(token) for _ in range(60) for batch in loader for token in batch["targets"].flatten()}
    assert seen == set(range(1, 50))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_batches(world_size):
    settings = {"context": 8, "batch_size": 5, "seed": 1}
    tokens = np.arange(300, dtype=np.int32)
    whole = [batch["tokens"][:, 0].tolist() for batch in BlockLoader(tokens, **settings)]
    shares = [list(BlockLoader(tokens, **settings, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for number, expected in enumerate(whole):
        found = [int(x) for share in shares if share[number].weight for x in share[number].batch["tokens"][:, 0]]
        assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("length", [2, 5, 9, 10, 24, 25, 31])
def test_each_target_counts_in_one_window(length, stride):
    tokens = np.arange(length, dtype=np.int32)
    counted = []
    for batch in WindowLoader(tokens, context=8, stride=stride, batch_size=2):
        assert batch["tokens"].shape[1] == min(8, length - 1)
        for row, targets in zip(batch["tokens"], batch["targets"], strict=True):
            own = targets != IGNORED
            assert targets[own].equal(row[own] + 1)
            counted += targets[own].tolist()
            if row[0] > 0 and own.any():
                assert int(own.nonzero()[0]) >= 8 - stride
    assert counted == list(range(1, length))


# --- the data module -------------------------------------------------------------------------------------------------


def test_the_end_is_held_out(file):
    module = data(file)
    decoded = {name: module.vocabulary.decode(text.tokens.tolist()) for name, text in module.splits.items()}
    assert decoded["train"] + decoded["val"] == TEXT
    assert len(decoded["val"]) == len(TEXT) // 10
    assert module.num_tokens == len(set(decoded["train"]))


def test_a_folder_is_several_documents(tmp_path):
    for name, text in (("b", "second " * 9), ("a", "first " * 9)):
        (tmp_path / f"{name}.txt").write_text(text)
    module = data(str(tmp_path), validation_fraction=0)
    text = module.splits["train"]
    border = module.vocabulary.border
    assert module.num_tokens == len(set("first second")) + 1
    assert (text.tokens == border).nonzero()[0].tolist() == [54, 118]
    assert text.characters == 54 + 63 - 1
    assert module.eval_split_names == ()


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'tenzoo[text]'")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["one " * 20, "two " * 20]}), tmp_path / "text.parquet")
    module = data(str(tmp_path / "text.parquet"), validation_fraction=0)
    assert module.vocabulary.decode(module.splits["train"].tokens.tolist()) == "one " * 20 + "\n" + "two " * 20 + "\n"
    parquet.write_table(pyarrow.table({"words": ["one"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"a column 'text' in `train`, got \['words'\]"):
        data(str(tmp_path / "other.parquet"))
    parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="text in row 2 of"):
        data(str(tmp_path / "none.parquet"))


def test_byte_pairs(file):
    pytest.importorskip("tokenizers", reason="pip install 'tenzoo[text]'")
    module = data(file, tokenizer="bpe", vocabulary_size=300)
    train = module.splits["train"]
    assert 257 < module.num_tokens <= 300
    assert len(train.tokens) < train.characters / 2
    assert (
        module.vocabulary.decode(train.tokens.tolist())
        == TEXT[: train.characters + len(module.vocabulary.decode(train.tokens[:1].tolist()))]
    )
    again = vocabulary_of(module.vocabulary.state)
    assert (
        again.encode("über the fox", arg="prompt").tolist() == module.vocabulary.encode("über the fox", arg="").tolist()
    )
    assert again.decode(again.encode("über the fox", arg="prompt").tolist()) == "über the fox"


def test_a_tokenizer_of_a_file(file, tmp_path):
    pytest.importorskip("tokenizers", reason="pip install 'tenzoo[text]'")
    trained = data(file, tokenizer="bpe", vocabulary_size=300)
    (tmp_path / "tokenizer.json").write_text(trained.vocabulary.state["tokenizer"])
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        module = data(file, tokenizer=str(source))
        assert np.array_equal(module.splits["train"].tokens, trained.splits["train"].tokens)


@pytest.mark.parametrize("eos_token", ["</s>", {"content": "</s>"}])
def test_a_folder_of_a_tokenizer_names_the_border_of_documents(file, tmp_path, eos_token):
    pytest.importorskip("tokenizers", reason="pip install 'tenzoo[text]'")
    trained = data(file, tokenizer="bpe", vocabulary_size=300).vocabulary.state["tokenizer"]
    (tmp_path / "tokenizer.json").write_text(trained.replace("<|endoftext|>", "</s>"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "ab":
        (texts / f"{name}.txt").write_text(f"the {name} fox " * 9)
    with pytest.raises(ValueError, match=r"^expected a tokenizer with the token '<\|endoftext\|>' .* in `tokenizer`"):
        data(str(texts), tokenizer=str(tmp_path), validation_fraction=0)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    module = data(str(texts), tokenizer=str(tmp_path), validation_fraction=0)
    tokens = module.splits["train"].tokens
    assert (tokens == module.vocabulary.border).sum() == 2
    read = vocabulary_of(module.vocabulary.state)
    assert read.decode(tokens.tolist()) == "the a fox " * 9 + "\n" + "the b fox " * 9 + "\n"


@pytest.mark.parametrize("stride", [None, 4])
def test_validation_has_all_targets(file, stride):
    module = data(file, stride=stride)
    (loader,) = module.val_dataloader()
    assert sum(int((batch["targets"] != IGNORED).sum()) for batch in loader) == len(module.splits["val"].tokens) - 1
    assert len(list(module.test_dataloader())) == len(list(loader))


def test_a_test_text_and_a_text_of_validation(file, tmp_path):
    (tmp_path / "other.txt").write_text("dog over fox\n" * 4)
    module = data(file, validation=str(tmp_path / "other.txt"), test=file)
    assert {name: text.characters for name, text in module.splits.items()} == {
        "train": len(TEXT) - 1,
        "val": 52 - 1,
        "test": len(TEXT) - 1,
    }


@pytest.mark.parametrize("place", [0, 3, 9, 30])
def test_batches_resume_exactly(file, place):
    module, other = data(file), data(file)
    loader, other_loader = module.train_dataloader(), other.train_dataloader()
    stream, rest = _stream(loader), _stream(other_loader)
    for _ in range(place):
        next(stream)
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    for _ in range(40):
        one, two = next(stream), next(rest)
        assert one["tokens"].equal(two["tokens"])


def _stream(loader):
    while True:
        yield from loader


def test_a_checkpoint_of_another_text_is_refused(file, tmp_path):
    (tmp_path / "other.txt").write_text(TEXT + "!")
    state = data(file).state_dict()
    with pytest.raises(ValueError, match="expected the `vocabulary` of the checkpoint"):
        data(str(tmp_path / "other.txt"), validation_fraction=0).load_state_dict(state)
    with pytest.raises(ValueError, match="expected the `checksum` of the checkpoint"):
        data(file, validation_fraction=0.2).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": "nowhere.txt"}, r"a file or a folder of text in `train`, got 'nowhere.txt', which does not exist"),
        ({"context": 0}, r"in `context`, got 0"),
        ({"stride": 17}, r"at most the context 16 in `stride`, got 17"),
        ({"stride": 0}, r"in `stride`, got 0"),
        ({"batch_size": 0}, r"in `batch_size`, got 0"),
        ({"vocabulary_size": 100}, r"in `vocabulary_size`, got 100"),
        ({"validation_fraction": 1.0}, r"in `validation_fraction`, got 1.0"),
        (
            {"tokenizer": "words"},
            r"'characters', 'bpe', or a file or folder of a tokenizer in `tokenizer`, got 'words'",
        ),
        ({"context": 5000}, r"at least 5001 tokens for train in `train`, got 1620"),
        ({"validation_fraction": 0.0004}, r"at least 2 tokens for val in `train`, got 0"),
        ({"train": 3}, r"a path in `train`, got 3"),
    ],
)
def test_what_is_refused(file, settings, words):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=words):
        data(settings.pop("train", file), **settings)


def test_texts_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="expected text in `train`, got none in"):
        data(str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes("abc\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"text in UTF-8 in `train`, got .*latin.txt', which is not at byte 3"):
        data(str(tmp_path / "latin.txt"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"files \*.txt in the folder in `train`, got none"):
        data(str(tmp_path / "folder"))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "text.txt").write_text(TEXT)
    pytest.importorskip("tokenizers", reason="pip install 'tenzoo[text]'")
    with pytest.raises(ValueError, match="expected a tokenizer of the package tokenizers in `tokenizer`"):
        data(str(tmp_path / "text.txt"), tokenizer=str(tmp_path))


def test_a_character_that_is_not_known(file, tmp_path):
    (tmp_path / "other.txt").write_text("the fox?")
    with pytest.raises(
        ValueError, match=r"the 30 characters of the training text in `validation`, got '\?' at place 7"
    ):
        data(file, validation=str(tmp_path / "other.txt"))


@pytest.mark.parametrize("text", ["", "a", "äöü😀\n"])
def test_characters_come_back(text):
    known = Characters("😀äöü\nab", border=True)
    assert known.decode(known.encode(text, arg="prompt").tolist()) == text
    assert known.size == 8
    assert known.border == 7


def test_line_ends_and_byte_order_marks(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + b"one two\r\n" * 20)
    module = data(str(tmp_path / "text.txt"), validation_fraction=0)
    assert module.vocabulary.decode(module.splits["train"].tokens.tolist()) == "one two\n" * 20


def test_characters_of_the_end_that_is_held_out_are_known(tmp_path):
    path = tmp_path / "rare.txt"
    path.write_text("abc " * 100 + "ß" * 5)
    data = TextCorpusDataModule(str(path), context=8)
    data.setup("fit")
    assert data.num_tokens == 5
    assert data.vocabulary.decode(data.splits["val"].tokens[-3:].tolist()) == "ßßß"
    assert not (data.splits["train"].tokens == data.vocabulary.encode("ß", arg="prompt")[0]).any()


# --- tokenizers of others ------------------------------------------------------------------------------------------


def given(folder, model, **settings):
    """A tokenizer of the package, as a file."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra text: pip install tenzoo[text]")
    made = tokenizers.Tokenizer(model(tokenizers))
    for name, value in settings.items():
        setattr(made, name, value(tokenizers))
    return made, folder / "tokenizer.json"


def corpus(folder, tokenizer, text):
    (folder / "text.txt").write_text(text)
    data = TextCorpusDataModule(str(folder / "text.txt"), tokenizer=str(tokenizer), context=8)
    data.setup("fit")
    return data


def letters(text, *more):
    return {letter: number for number, letter in enumerate([*more, *sorted(set(text))])}


def test_truncation_and_padding_of_a_tokenizer_do_not_cut_the_text(tmp_path):
    text = "abc cab bac " * 40
    made, path = given(tmp_path, lambda package: package.models.BPE(letters(text), []))
    made.enable_truncation(16)
    made.enable_padding(length=32)
    made.save(str(path))
    assert sum(len(split.tokens) for split in corpus(tmp_path, path, text).splits.values()) == len(text)


def test_a_tokenizer_that_loses_characters_is_refused(tmp_path):
    text = "abc cab bac " * 40
    made, path = given(tmp_path, lambda package: package.models.BPE(letters("ab "), []))
    made.save(str(path))
    with pytest.raises(
        ValueError, match=r"^expected a tokenizer that knows all characters of `train`, got one without 'c'"
    ):
        corpus(tmp_path, path, text)


def test_unknown_words_leave_no_bits_per_character(tmp_path, caplog):
    words = {"[UNK]": 0, "abc": 1, "cab": 2}
    made, path = given(
        tmp_path,
        lambda package: package.models.WordLevel(words, unk_token="[UNK]"),
        pre_tokenizer=lambda package: package.pre_tokenizers.Whitespace(),
    )
    made.save(str(path))
    with caplog.at_level("INFO"):
        data = corpus(tmp_path, path, "abc cab bac " * 40)
    assert {split.characters for split in data.splits.values()} == {0}
    assert "tokens are unknown to the tokenizer: no bits per character" in caplog.text


def test_spaces_stay_between_tokens_that_are_decoded_one_by_one(tmp_path):
    text = "once upon a time there was a girl " * 8
    made, path = given(
        tmp_path,
        lambda package: package.models.WordLevel(
            letters("", "[UNK]", *(f"▁{word}" for word in sorted(set(text.split())))), unk_token="[UNK]"
        ),
        pre_tokenizer=lambda package: package.pre_tokenizers.Metaspace(),
        decoder=lambda package: package.decoders.Metaspace(),
    )
    made.save(str(path))
    vocabulary = corpus(tmp_path, path, text.strip()).vocabulary
    tokens = vocabulary.encode("once upon a time there was a girl", arg="prompt").tolist()
    assert "".join(vocabulary.continued(tokens[:2], tokens[2:])) == " a time there was a girl"
    long = tokens * 6
    assert "".join(vocabulary.continued(long[:1], long[1:])) == vocabulary.decode(long)[len("once") :]


def test_unknown_pieces_of_a_unigram_model_leave_no_bits_per_character(tmp_path, caplog):
    pieces = [("<unk>", 0.0), *((letter, -1.0) for letter in "abc ")]
    made, path = given(tmp_path, lambda package: package.models.Unigram(pieces, unk_id=0))
    made.save(str(path))
    with caplog.at_level("INFO"):
        data = corpus(tmp_path, path, "abc cab bac dab " * 40)
    assert data.vocabulary.unknown == 0
    assert {split.characters for split in data.splits.values()} == {0}
    assert "tokens are unknown to the tokenizer: no bits per character" in caplog.text


@pytest.mark.parametrize("keeps", [True, False])
def test_what_a_tokenizer_drops_is_not_counted(tmp_path, caplog, keeps):
    made, path = given(
        tmp_path,
        lambda package: package.models.WordLevel({"[UNK]": 0, "abc": 1, "cab": 2, "\n": 3, " ": 4}, unk_token="[UNK]"),
        pre_tokenizer=lambda package: (
            package.pre_tokenizers.Split(" ", "isolated") if keeps else package.pre_tokenizers.Whitespace()
        ),
        decoder=lambda package: package.decoders.Fuse(),
    )
    made.save(str(path))
    with caplog.at_level("INFO"):
        data = corpus(tmp_path, path, "abc cab abc " * 40)
    counted = sum(split.characters for split in data.splits.values())
    assert counted > 400 if keeps else counted == 0
    assert ("does not keep all of the text: no bits per character" in caplog.text) is not keeps


def test_prompts_without_a_token_are_refused(tmp_path):
    made, path = given(
        tmp_path,
        lambda package: package.models.WordLevel({"[UNK]": 0, "abc": 1, "cab": 2}, unk_token="[UNK]"),
        pre_tokenizer=lambda package: package.pre_tokenizers.Whitespace(),
    )
    made.save(str(path))
    data = corpus(tmp_path, path, "abc cab abc " * 40)
    (tmp_path / "prompts.txt").write_text("abc\n \n")
    data.hparams["predict"] = str(tmp_path / "prompts.txt")
    with pytest.raises(ValueError, match=r"at least one token in `predict`, got none in prompt 2: ' '"):
        data.predict_dataloader()


def test_prompts_in_files_are_named_by_their_number(file, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("a", "fox"), ("b", ""), ("c", "dog")):
        (folder / f"{name}.txt").write_text(text)
    module = data(file, predict=str(folder))
    with pytest.raises(ValueError, match=r"an empty one, number 2, in"):
        module.predict_dataloader()
    (folder / "b.txt").write_text("föx")
    with pytest.raises(ValueError, match=r"got 'ö' at place 1; tokenizer 'bpe' takes any text of prompt 2"):
        module.predict_dataloader()
