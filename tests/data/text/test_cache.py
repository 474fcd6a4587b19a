import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest

from tenzoo.data import TextDataModule
from tenzoo.data.text import preparation
from tests.data.text.small_texts import make, make_tokenizer, random_texts, write_small, write_tsv
from tests.processes import in_processes


class Counted:
    """Counts how often texts are tokenized."""

    def __init__(self, monkeypatch) -> None:
        self.texts: list[int] = []
        whole = preparation.tokenize

        def counted(tokenizer, texts, **options):
            self.texts.append(len(texts[0]))
            return whole(tokenizer, texts, **options)

        monkeypatch.setattr(preparation, "tokenize", counted)


@pytest.fixture
def counted(monkeypatch) -> Counted:
    return Counted(monkeypatch)


def ids_of(data: TextDataModule) -> dict[str, list[int]]:
    data.setup()
    return {name: texts.tokens.ids.tolist() for name, texts in data.splits.items()}


def entries(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.npz"))


def test_texts_are_tokenized_once(tmp_path, counted):
    first = ids_of(make(tmp_path))
    assert counted.texts == [107, 20]
    assert ids_of(make(tmp_path, seed=4, batch_size=3)) == first
    assert ids_of(make(tmp_path, per_class=4)).keys() == first.keys()
    assert counted.texts == [107, 20]
    assert len(entries(tmp_path)) == 2
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_labels_do_not_matter_but_texts_do(tmp_path, counted):
    make(tmp_path).setup()
    columns = {"sentence": random_texts(107), "label": [0, 1] * 53 + [1]}
    make(tmp_path, train=write_tsv(tmp_path / "other.tsv", columns), validation=None).setup()
    assert counted.texts == [107, 20]
    columns["sentence"][50] += " w1"
    other = make(tmp_path, train=write_tsv(tmp_path / "other.tsv", columns), validation=None)
    assert max(map(max, ids_of(other).values())) < 70
    assert counted.texts == [107, 20, 107]


@pytest.mark.parametrize(
    "options",
    [{"max_length": 7}, {"template": "{sentence} a"}, {"text": ["sentence", "sentence"]}, {"tokenizer": None}],
)
def test_other_settings_are_other_entries(tmp_path, counted, options):
    make(tmp_path).setup()
    if "tokenizer" in options:
        other = make_tokenizer(truncation_side="left")
        other.save_pretrained(tmp_path / "left")
        options = {"tokenizer": str(tmp_path / "left")}
    make(tmp_path, **options).setup()
    assert counted.texts == [107, 20, 107, 20]


def test_a_copy_of_a_tokenizer_has_the_same_entries(tmp_path, counted):
    make(tmp_path).setup()
    make_tokenizer(padding_side="right").save_pretrained(tmp_path / "copy")
    make(tmp_path, tokenizer=str(tmp_path / "copy")).setup()
    assert counted.texts == [107, 20]


def rewritten(**changes):
    def change(path: Path) -> None:
        with np.load(path) as file:
            arrays = dict(file)
        for name, value in changes.items():
            arrays[name] = value(arrays[name]) if callable(value) else value
        np.savez(path, **arrays)

    return change


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[400] ^= 4
    path.write_bytes(bytes(content))


def encrypted(path: Path) -> None:
    """Set the flag of the first file in the archive's directory that says so."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "encrypted": encrypted,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an archive"),
    "truncated": truncated,
    "a bit": flipped,
    "of other texts": rewritten(key=np.array("0" * 32)),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({})),
    "a pickle within": rewritten(ids=np.array([{}], dtype=object)),
    "no offsets": lambda path: np.savez(path, ids=np.zeros(3, dtype=np.int32)),
    "float": rewritten(ids=lambda ids: ids.astype(np.float32)),
    "out of the vocabulary": rewritten(ids=lambda ids: ids + np.int32(1000)),
    "negative": rewritten(ids=lambda ids: -ids),
    "fewer texts": rewritten(offsets=lambda offsets: offsets[[*range(9), -1]]),
    "backwards": rewritten(offsets=lambda offsets: np.concatenate([offsets[:1], offsets[-2:0:-1], offsets[-1:]])),
    "fewer types": rewritten(types=lambda types: types[:-1]),
    "more": rewritten(more=np.zeros(2)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_anew(tmp_path, counted, damage):
    first = ids_of(make(tmp_path))
    for path in entries(tmp_path):
        DAMAGES[damage](path)
    assert ids_of(make(tmp_path)) == first
    assert counted.texts == [107, 20, 107, 20]
    assert ids_of(make(tmp_path)) == first
    assert len(counted.texts) == 4


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".tmp-1234-some.npz").write_bytes(b"x")
    make(tmp_path).setup()
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_the_default_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of the user"))
    make(tmp_path, cache=None).setup()
    assert len(list((tmp_path / "of the user" / "tenzoo" / "text").glob("*.npz"))) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(UserWarning, match="cannot write to `cache`"):
        make(tmp_path).setup()


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    data = make(tmp_path, cache=str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"tokens are not kept for the next run: cannot write to `cache` \(.*file\)"):
        data.setup()
    assert len(data.splits["train"]) == 107


def set_up(given) -> tuple[dict[str, list[int]], int]:
    """All tokens, and how many texts this process tokenized."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        return ids_of(TextDataModule(**given)), sum(counted.texts)


def test_an_error_of_the_texts_is_not_taken_for_one_of_the_folder(tmp_path, monkeypatch):
    def failing(*args, **options):
        raise ValueError("the texts are wrong")

    monkeypatch.setattr(preparation, "tokenize", failing)
    with pytest.raises(ValueError, match="the texts are wrong"):
        make(tmp_path).setup()


@pytest.mark.slow
def test_processes_that_start_together(tmp_path):
    given = write_small(tmp_path)
    results = in_processes(set_up, given, count=4)
    assert sum(tokenized for _, tokenized in results) == 127
    assert len(entries(tmp_path)) == 2
    again, tokenized = set_up(given)
    assert tokenized == 0
    assert all(ids == again for ids, _ in results)
