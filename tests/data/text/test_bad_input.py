import builtins
import json
import sys
from pathlib import Path

import pytest

from tenzoo.data import TextDataModule
from tests.data.text.small_texts import make, make_tokenizer, random_texts, save_tokenizer, write_tsv


def refused(tmp_path, message: str, kind: type[Exception] = ValueError, **options) -> None:
    """One line, before training."""
    if "train" in options:  # the usual labels to validate with may not be in it
        options = {"validation": options["train"]} | options
    with pytest.raises(kind, match=message) as caught:
        make(tmp_path, **options).setup()
    assert "\n" not in str(caught.value)


def table(tmp_path, name: str = "some.tsv", **columns) -> str:
    return write_tsv(tmp_path / name, columns)


def written(tmp_path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


TEXTS = random_texts(6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", r"expected at least one row of text in `train`, got none in '.*a\.tsv'"),
        ("a.tsv", "\n\n", "expected at least one row of text in `train`, got none in"),
        ("a.tsv", "sentence\tlabel\n", "expected at least one row of text in `train`, got none in"),
        ("a.csv", "", "expected at least one row of text in `train`, got none in"),
        ("a.csv", "sentence,label\n", "expected at least one row of text in `train`, got none in"),
        ("a.jsonl", "", "expected at least one row of text in `train`, got none in"),
        ("a.jsonl", "{}\n{}\n", "expected at least one row of text in `train`, got none in"),
        (
            "a.tsv",
            "sentence\tlabel\nw1\t0\nw2\t1\tx\n",
            r"expected 2 cells in line 3 of .*a\.tsv, as in its first line, got 3",
        ),
        ("a.tsv", "sentence\tlabel\nw1\n", "expected 2 cells in line 2 of .*, got 1"),
        ("a.tsv", "sentence\tlabel\nw1\t0\n\nw2\t1\n", "expected 2 cells in line 3 of .*, got 1"),
        ("a.tsv", "sentence\tlabel\nw1\t0\nw2\t1\n\n", "expected 2 cells in line 4 of .*, got 1"),
        ("a.csv", "sentence,label\nw1,0\nw2,1,x\n", "expected 2 cells in row 2 of .*, got 3"),
        ("a.csv", "sentence,label\nw1,0\n\nw2,1\n", "expected 2 cells in row 2 of .*, got 1"),
        ("a.csv", "sentence,label\nw1,0\nw2,1\n\n", "expected 2 cells in row 3 of .*, got 1"),
        ("a.csv", "\n\n", "expected at least one row of text in `train`, got none in"),
        ("a.tsv", "\r\n\r\n", "expected at least one row of text in `train`, got none in"),
        (
            "a.csv",
            'sentence,label\n"w1,0\n',
            r"expected a readable \.csv file in `train`, got .*: unexpected end of data",
        ),
        (
            "a.tsv",
            b"sentence\tlabel\nw\xff\t0\n",
            r"expected a readable \.tsv file in `train`, got .*: not UTF-8 at byte 16",
        ),
        (
            "a.tsv",
            "sentence\tlabel\tlabel\nw1\t0\t1\n",
            "expected distinct names of columns in .*, got 'label' more than once",
        ),
        (
            "a.jsonl",
            '{"sentence": "w1", "label": 0}\n[1]\n',
            r"expected one JSON object per line, got '\[1\]' in line 2 of",
        ),
        (
            "a.jsonl",
            '{"sentence": "w1", "label": 0}\n{"sentence": "w1", "label": 0, "label": 1}',
            "expected distinct keys in line 2 of .*, got 'label' more than once$",
        ),
        (
            "a.jsonl",
            '{"sentence": "w1", "label": 0, "more": {"a": 1, "a": 2}}',
            "expected distinct keys in line 1 of .*, got 'a' more than once$",
        ),
        ("a.jsonl", '{"sentence": "w1", "label": 0}\n{"sen', "expected one JSON object per line, got .* in line 2 of"),
        (
            "a.jsonl",
            '{"sentence": "w1", "label": 0}\n{"label": 0}',
            r"expected the keys \['sentence', 'label'\] of the first line, got \['label'\] in line 2",
        ),
        ("a.json", '[{"sentence": "w1",\n "label": 0}]', "expected one JSON object per line, got"),
        ("a.jsonl", '{"sentence": 5, "label": 0}', "expected text in column 'sentence' in line 1 of .*, got 5"),
        ("a.jsonl", '{"sentence": null, "label": 0}', "expected text in column 'sentence' in line 1 of .*, got None"),
        ("a.jsonl", "[" * 100000, "expected one JSON object per line, got"),
        (
            "a.jsonl",
            '{"sentence": "\\ud800", "label": 0}',
            "expected text in column 'sentence' in line 1 of .*, got '.ud800'",
        ),
        (
            "a.jsonl",
            '{"sentence": "w1", "label": [0]}',
            r"expected a name or a number in column 'label' in line 1 of .*, got \[0\]",
        ),
        ("a.parquet", "not parquet", r"expected a Parquet file, got '.*a\.parquet': "),
        (
            "a.txt",
            "sentence\tlabel\nw1\t0\n",
            r"expected a file that ends in \.tsv, .* in `train`, got another ending: '.*a\.txt'",
        ),
    ],
)
def test_files(tmp_path, name, content, message):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    if "column 'sentence'" in message:
        content += "\n" + json.dumps({"sentence": "w1", "label": 1})
    refused(tmp_path, message, train=written(tmp_path, name, content))


@pytest.mark.parametrize("ending", ["tsv", "csv"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_empty_lines_of_one_column_are_rows(tmp_path, ending, line_end):
    unit, first = ("line", 2) if ending == "tsv" else ("row", 1)
    for lines, row in ((["w1", "w2", ""], 2), (["w1", "", "w2"], 1), (["w1", "", ""], 1), (["", "w1"], 0)):
        content = "".join(line + line_end for line in ["sentence", *lines])
        predict = written(tmp_path, f"a.{ending}", content)
        message = f"expected text in column 'sentence' in {unit} {first + row} of .*, got ''"
        refused(tmp_path, message, predict=predict)
    whole = make(tmp_path, predict=written(tmp_path, f"a.{ending}", f"sentence{line_end}w1{line_end}w2"))
    whole.setup()
    assert len(whole.splits["predict"]) == 2


@pytest.mark.parametrize("arg", ["train", "validation", "test", "predict"])
def test_missing_files(tmp_path, arg):
    missing = str(tmp_path / "none.tsv")
    refused(tmp_path, f"expected a file in `{arg}`, got '{missing}', which", FileNotFoundError, **{arg: missing})
    refused(tmp_path, f"expected a file that ends in .* in `{arg}`, got a folder", **{arg: str(tmp_path)})
    refused(tmp_path, f"expected a path or a name in `{arg}`, got 5", TypeError, **{arg: 5})


def test_missing_columns(tmp_path):
    odd = table(tmp_path, sent=TEXTS, label=[0, 1] * 3)
    refused(
        tmp_path,
        r"expected one of the columns question\+sentence, .*, text in .*, got \['sent', 'label'\]; name those of text",
        train=odd,
    )
    refused(tmp_path, r"column of .* in `text`, of \['sent', 'label'\], got 'words'", train=odd, text="words")
    refused(tmp_path, r"column of .* in `template`, of \['sent', 'label'\], got 'a'", train=odd, template="{a}.")
    refused(tmp_path, r"column of .* in `label`, of \['sent', 'label'\], got 'score'", train=odd, label="score")
    refused(tmp_path, r"column of .* in `text`, of \['sent', 'label'\], got 'sentence'", test=odd)


def test_the_column_of_labels_is_not_taken_for_text(tmp_path):
    train = table(tmp_path, question=["yes", "no"] * 3, sentence=["w1"] * 6)
    data = make(tmp_path, train=train, validation=train, label="question")
    data.setup()
    assert data.label_names == ["no", "yes"]
    assert set(data.splits["train"].tokens.lengths) == {3}
    refused(tmp_path, "expected one of the columns", train=table(tmp_path, text=["a", "b"] * 3), label="text")


@pytest.mark.parametrize("cell", ["", "   "])
def test_empty_cells(tmp_path, cell):
    texts = [*TEXTS[:3], cell, *TEXTS[4:]]
    train = table(tmp_path, sentence1=TEXTS, sentence2=texts, label=[0, 1] * 3)
    refused(tmp_path, f"expected text in column 'sentence2' in line 5 of .*, got '{cell}'", train=train)
    refused(tmp_path, "expected text in column 'sentence2'", train=train, template="{sentence1} , {sentence2}")
    make(tmp_path, train=train, validation=train, text="sentence1").setup()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3, 0, 1, 3], "expected classes counted from 0 without gaps in column 'label' of .*, got 0, 1, 3"),
        ([1, 2, 1, 2, 1, 2], "expected classes counted from 0 without gaps in column 'label' of .*, got 1, 2"),
        ([-1, 0, 1, 0, 1, 0], "expected classes counted from 0 without gaps in column 'label' of .*, got -1, 0, 1"),
        ([0, 1, "", 0, 1, 0], "expected a label in column 'label' in line 4 of .*, got none"),
        ([0, 1, "x", 0, 1, 0], "expected numbers or names as labels in column 'label' of .*, got both: '0' and 'x'"),
        ([0.5, 1, "nan", 0, 1, 0], "expected numbers or names as labels in column 'label' of .*, got both"),
        ([0.5, 1, "1e999", 0, 1, 0], "expected a finite number in column 'label' in line 4 of .*, got '1e999'"),
        (["x"] * 6, "expected at least two classes in column 'label' of .*, got 'x' alone"),
        ([0] * 6, "expected at least two classes in column 'label' of .*, got '0' alone"),
    ],
)
def test_labels(tmp_path, labels, message):
    refused(tmp_path, message, train=table(tmp_path, sentence=TEXTS, label=labels), validation=None)


@pytest.mark.parametrize("arg", ["validation", "test"])
@pytest.mark.parametrize("label", [3, -1, "", "x", 0.5])
def test_labels_that_are_not_trained_on(tmp_path, arg, label):
    other = table(tmp_path, sentence=TEXTS, label=[0, 1, 2, 0, label, 1])
    message = f"expected a label of those to train on, 0, 1, 2, in column 'label' in line 6 of .*, got '{label}'"
    refused(tmp_path, message, **{arg: other})


def test_names_that_are_not_trained_on(tmp_path):
    train = table(tmp_path, sentence=TEXTS, label=["yes", "no"] * 3)
    other = table(tmp_path, "other.tsv", sentence=TEXTS, label=["yes", "No"] * 3)
    refused(tmp_path, "expected a label of those to train on, no, yes, .* in line 3", train=train, validation=other)
    refused(
        tmp_path, "expected a column of .* in `label`", train=train, validation=table(tmp_path, "c.tsv", sentence=TEXTS)
    )


def test_numbers_are_wanted_for_regression(tmp_path):
    train = table(tmp_path, sentence=TEXTS, label=[0.5, 1, 2, 3, 4, 5])
    other = table(tmp_path, "other.tsv", sentence=TEXTS, label=[1, 2, "x", 3, 4, 5])
    refused(tmp_path, "expected a finite number in column 'label' in line 4", train=train, validation=other)
    refused(tmp_path, "expected None in `per_class` for labels that are numbers, got 2", train=train, per_class=2)


def test_too_few_examples(tmp_path):
    train = table(tmp_path, sentence=TEXTS, label=["a"] * 4 + ["b"] * 2)
    refused(
        tmp_path,
        "expected at most the 2 examples of class 'b' in `train` in `per_class`, got 3",
        train=train,
        validation=train,
        per_class=3,
    )
    refused(
        tmp_path,
        "expected a `validation_fraction` that holds something out of the 6 examples in `train`, got 0.1",
        train=train,
        validation=None,
    )
    refused(
        tmp_path,
        "expected a `validation_fraction` that leaves something to train on, got 0.99",
        train=train,
        validation=None,
        validation_fraction=0.99,
    )


def test_tokenizers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plain = make_tokenizer()
    plain.pad_token = None
    plain.save_pretrained(tmp_path / "plain")
    message = "expected a tokenizer with a pad token in `tokenizer`, got .* with none; save it again"
    refused(tmp_path, message, tokenizer=str(tmp_path / "plain"))
    short = save_tokenizer(tmp_path / "short", model_max_length=64)
    refused(tmp_path, "expected at most the 64 tokens of .* in `max_length`, got 65", tokenizer=short, max_length=65)
    (tmp_path / "empty").mkdir()
    message = "expected the folder of a tokenizer, a GGUF file, or a name on the hub, in `tokenizer`, got"
    refused(tmp_path, message, tokenizer=str(tmp_path / "empty"))
    (Path(short) / "tokenizer.json").write_text("{")
    refused(tmp_path, message, tokenizer=short)


def test_a_text_without_tokens(tmp_path):
    plain = make_tokenizer()
    from tokenizers import normalizers, processors

    plain.backend_tokenizer.post_processor = processors.Sequence([])
    plain.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    plain.save_pretrained(tmp_path / "plain")
    train = table(tmp_path, sentence=[*TEXTS[:5], "\u200b"], label=[0, 1] * 3)
    message = "expected a text with tokens in line 7 of .*, got none that the tokenizer knows"
    refused(tmp_path, message, train=train, tokenizer=str(tmp_path / "plain"))


def without_some_signs(tmp_path) -> str:
    """A tokenizer that adds two tokens, and makes none of a space of no width."""
    from tokenizers import normalizers

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.save_pretrained(tmp_path / "signs")
    return str(tmp_path / "signs")


@pytest.mark.parametrize(
    "options",
    [
        {"text": "b"},
        {"text": ["a", "b"]},
        {"text": ["b", "a"]},
        {"template": "{b}"},
        {"template": "{a} , {b} ."},
    ],
)
def test_a_text_of_which_only_added_tokens_remain(tmp_path, options):
    train = table(tmp_path, a=TEXTS, b=[*TEXTS[:4], "\u200b", "\u200b"], label=[0, 1] * 3)
    message = "expected a text with tokens in line 6 of .*, got none that the tokenizer knows"
    refused(tmp_path, message, train=train, tokenizer=without_some_signs(tmp_path), **options)
    assert not list((tmp_path / "cache").glob("*.npz"))


@pytest.mark.parametrize(
    ("text", "added", "least"), [("sentence", 2, 3), (["sentence", "sentence"], 3, 5), (None, 2, 3)]
)
def test_no_room_for_a_text(tmp_path, text, added, least):
    for length in (1, least - 1):
        message = f"expected at least {least} in `max_length`, {added} tokens that .* adds .*, got {length}$"
        refused(tmp_path, message, text=text, max_length=length)
    refused(tmp_path, "expected at least 3 in `max_length`", template="{sentence}", max_length=2)
    data = make(tmp_path, text=text, max_length=least)
    data.setup()
    assert {int(texts.tokens.lengths.max()) for texts in data.splits.values()} == {least}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"text": []}, ValueError, r"expected the name of a column in `text`, or two, got \[\]"),
        ({"text": 5}, TypeError, "expected the name of a column in `text`, or two, got 5$"),
        ({"text": ["a", 5]}, TypeError, r"expected the name of a column in `text`, or two, got \['a', 5\]$"),
        ({"text": {"a": "b"}}, TypeError, "expected the name of a column in `text`, or two, got {'a': 'b'}$"),
        ({"template": 5}, TypeError, "expected a text with columns in braces in `template`, got 5$"),
        ({"label_kind": ["classes"]}, ValueError, r"expected 'classes', .* in `label_kind`, got \['classes'\]$"),
        ({"text": ["a", "b", "c"]}, ValueError, "expected the name of a column in `text`, or two, got"),
        ({"text": "a", "template": "{a}"}, ValueError, "expected `text` or `template`, got both: 'a' and '{a}'"),
        ({"template": "It was"}, ValueError, "expected columns in braces in `template`, .*, got 'It was' without one"),
        ({"template": "{} It was"}, ValueError, "expected columns in braces in `template`, .*, got '{} It was'"),
        ({"template": "{a!r} was"}, ValueError, "expected columns in braces in `template`, .*, got '{a!r} was'"),
        ({"template": "{a was"}, ValueError, "expected columns in braces in `template`, .*, got '{a was': "),
        (
            {"text": "label"},
            ValueError,
            r"expected columns other than 'label', that of `label`, in `text`, got \['label'\]$",
        ),
        (
            {"text": ["a", "b"], "label": "b"},
            ValueError,
            r"expected columns other than 'b', that of `label`, in `text`, got \['a', 'b'\]$",
        ),
        (
            {"template": "{a} is {label}"},
            ValueError,
            r"expected columns other than 'label', that of `label`, in `template`, got \['a', 'label'\]$",
        ),
        ({"per_class": 0}, ValueError, "expected at least 1 in `per_class`, got 0"),
        ({"per_class": 2.5}, TypeError, "expected an integer in `per_class`, got 2.5"),
        ({"max_length": 0}, ValueError, "expected at least 1 in `max_length`, got 0"),
        ({"batch_size": 0}, ValueError, "expected at least 1 in `batch_size`, got 0"),
        ({"batch_size": None}, TypeError, "expected an integer in `batch_size`, got None"),
        ({"eval_batch_size": 0}, ValueError, "expected at least 1 in `eval_batch_size`, got 0"),
        ({"seed": -1}, ValueError, "expected at least 0 in `seed`, got -1"),
        ({"validation_fraction": 1}, ValueError, r"expected a number in \[0, 1\) in `validation_fraction`, got 1"),
        ({"label": 3}, TypeError, "expected the name of a column in `label`, got 3"),
        ({"tokenizer": None}, TypeError, "expected a path or a name in `tokenizer`, got None"),
        ({"train": ""}, TypeError, "expected a path or a name in `train`, got ''"),
    ],
)
def test_arguments_are_checked_at_once(options, kind, message):
    with pytest.raises(kind, match=message):
        TextDataModule(**{"train": "a.tsv", "tokenizer": "b", **options})


@pytest.mark.parametrize(
    ("package", "options", "message"),
    [
        ("transformers", {}, "expected transformers for `tokenizer`, which is not installed"),
        (
            "datasets",
            {"train": "org/name:sub"},
            "expected a file in `train`, or the package datasets, .* 'org/name:sub'",
        ),
        ("pyarrow", {"train": "some.parquet"}, "expected pyarrow to read some.parquet, which is not installed"),
    ],
)
def test_packages_that_are_not_installed(tmp_path, monkeypatch, package, options, message):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return whole(name, *args, **kwargs)

    data = make(tmp_path, **options)
    monkeypatch.chdir(tmp_path)
    Path("some.parquet").write_bytes(b"")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=message + r".*; pip install 'tenzoo\[text\]'"):
        data.setup()
