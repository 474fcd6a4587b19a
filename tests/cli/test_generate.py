"""``tenzoo generate``: text that a trained model continues."""

import csv

import pytest
import torch
import yaml

from tenzoo.cli import main
from tenzoo.data.corpus.vocabulary import vocabulary_of
from tenzoo.models.generation import Sampling, generate
from tenzoo.tasks import CausalLMTask
from tests.data.running_text.test_corpus import TEXT
from tests.runs import runs, the_run


def trained(folder, num_tokens=30, **data):
    """The checkpoint of a few steps."""
    (folder / "text.txt").write_text(TEXT)
    network = {"num_tokens": num_tokens, "width": 16, "depth": 1, "heads": 2, "context": 16}
    cores = {"factorization": {"attention": "tt"}, "rank": 2}
    config = {
        "seed_everything": 0,
        "trainer": {
            "max_steps": 3,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "default_root_dir": str(folder / "runs"),
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"filename": "end"}}],
        },
        "model": {
            "class_path": "CausalLMTask",
            "init_args": {"network": {"class_path": "Decoder", "init_args": network | cores}},
        },
        "data": {
            "class_path": "TextCorpusDataModule",
            "init_args": {"train": str(folder / "text.txt"), "context": 16, "batch_size": 4, **data},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0
    return str(runs(folder / "runs")[0] / "checkpoints" / "end.ckpt")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "seed": 4}])
def test_a_prompt_is_continued(checkpoint, capsys, options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    capsys.readouterr()
    assert main(["generate", "--ckpt_path", checkpoint, "--prompt", "The quick", "--length", "30", *words]) == 0
    task = CausalLMTask.load_from_checkpoint(checkpoint, weights_only=True)
    state = torch.load(checkpoint, weights_only=True)["TextCorpusDataModule"]
    vocabulary = vocabulary_of(state["vocabulary"])
    prompt = torch.from_numpy(vocabulary.encode("The quick", arg="prompt")).long()[None]
    generator = torch.Generator().manual_seed(options.pop("seed", 0))
    tokens = generate(task.network, prompt, 30, sampling=Sampling(**options), generator=generator)
    expected = vocabulary.decode([int(token) for token in tokens])
    assert capsys.readouterr().out == f"The quick{expected}\n"


def test_tokens_of_bytes_wait_until_they_are_characters(tmp_path, capsys):
    pytest.importorskip("tokenizers", reason="pip install 'tenzoo[text]'")
    checkpoint = trained(tmp_path, num_tokens=280, tokenizer="bpe", vocabulary_size=280)
    state = torch.load(checkpoint, weights_only=True)["TextCorpusDataModule"]
    vocabulary = vocabulary_of(state["vocabulary"])
    tokens = vocabulary.encode("the föx 😀!", arg="prompt").tolist()
    for cut in range(1, 4):
        parts = list(vocabulary.continued(tokens[:cut], iter(tokens[cut:])))
        assert vocabulary.decode(tokens[:cut]) + "".join(parts) == "the föx 😀!"
        assert "\ufffd" not in "".join(parts)
    capsys.readouterr()
    assert main(["generate", "--ckpt_path", checkpoint, "--prompt", "für", "--length", "5"]) == 0
    assert capsys.readouterr().out.startswith("für")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "The §"], "the 30 characters of the training text in `prompt`, got '§' at place 4"),
        (["--prompt", ""], "a text of at least one token in `prompt`, got none"),
        (["--prompt", "The", "--length", "0"], "an int from 1 to 2^63 - 1 in `length`, got 0"),
        (
            ["--length", "abc"],
            "expected valid arguments for tenzoo generate, got: argument --length: invalid int value: 'abc'",
        ),
        (["--prompt", "The", "--temperature", "-1"], "in `temperature`, got -1.0"),
        (["--prompt", "The", "--top_p", "2"], "a number in (0, 1] in `top_p`, got 2.0"),
        (["--prompt", "The", "--top_k", "many"], "'many'"),
        ([], "`--prompt` for tenzoo generate, got none"),
    ],
)
def test_one_line_says_what_is_wrong(checkpoint, capsys, arguments, message):
    capsys.readouterr()
    assert main(["generate", "--ckpt_path", checkpoint, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tenzoo: error: ")
    assert message in line


def test_a_saved_folder_continues_prompts_and_has_its_vocabulary(checkpoint, tmp_path, capsys):
    folder = tmp_path / "model"
    assert main(["save", "--ckpt_path", str(checkpoint), "--output", str(folder)]) == 0
    words = ["--prompt", "The quick", "--length", "5"]
    capsys.readouterr()
    assert main(["generate", "--ckpt_path", str(checkpoint), *words]) == 0
    expected = capsys.readouterr().out
    assert main(["generate", "--ckpt_path", str(folder), *words]) == 0
    assert capsys.readouterr().out == expected


def test_checkpoints_of_other_tasks(tmp_path, capsys):
    assert main(["generate", "--prompt", "The"]) == 2
    assert "`--ckpt_path` for tenzoo generate, got none" in capsys.readouterr().err
    assert main(["generate", "--prompt", "The", "--ckpt_path", str(tmp_path / "no.ckpt")]) == 2
    assert "a checkpoint, or a folder of tenzoo save, in `ckpt_path`" in capsys.readouterr().err
    torch.save({"state_dict": {}, "global_step": 1}, tmp_path / "other.ckpt")
    assert main(["generate", "--prompt", "The", "--ckpt_path", str(tmp_path / "other.ckpt")]) == 2
    assert "expected a checkpoint of tenzoo fit, got another file" in capsys.readouterr().err


# --- texts of one's own --------------------------------------------------------------------------------------------


def test_a_text_of_ones_own_is_trained_on_continued_and_predicted(tmp_path, capsys, caplog):
    """Three commands with a config that was written for another vocabulary."""
    trained(tmp_path)
    own, prompts, root = tmp_path / "own.txt", tmp_path / "prompts.txt", tmp_path / "own_runs"
    own.write_text("abc cab, " * 60)
    prompts.write_text("abc\ncab,\n")
    config = ["--config", str(tmp_path / "config.yaml"), "--data.init_args.train", str(own)]
    config += ["--trainer.default_root_dir", str(root)]
    assert main(["fit", *config]) == 0
    checkpoint = str(the_run(root) / "checkpoints" / "end.ckpt")
    assert "num_tokens 5, as in the text (the config has 30)" in caplog.text
    capsys.readouterr()
    assert CausalLMTask.load_from_checkpoint(checkpoint, weights_only=True).network.num_tokens == 5

    assert main(["generate", "--ckpt_path", checkpoint, "--prompt", "ab", "--length", "20"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("ab")
    assert set(text[:-1]) <= set("abc, ")

    more = ["--ckpt_path", checkpoint, "--data.init_args.predict", str(prompts)]
    assert main(["predict", *config, *more, "--model.init_args.continuation.length", "7"]) == 0
    (path,) = root.rglob("continuations.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == ["abc", "cab,"]
    assert [len(row["continuation"]) for row in rows] == [7, 7]


@pytest.mark.parametrize(("number", "said"), [(None, True), (30, True), (6, False)])
def test_the_number_of_tokens_of_a_text(tmp_path, capsys, caplog, number, said):
    """It is settled where none is given, or where the text alone is given by hand."""
    trained(tmp_path)
    (tmp_path / "own.txt").write_text("abc cab, " * 60)
    arguments = ["--config", str(tmp_path / "config.yaml"), "--data.init_args.train", str(tmp_path / "own.txt")]
    if number is None:
        text = (tmp_path / "config.yaml").read_text().replace("num_tokens: 30", "num_tokens: null")
        (tmp_path / "config.yaml").write_text(text)
    elif number != 30:
        arguments += ["--model.init_args.network.init_args.num_tokens", str(number)]
    capsys.readouterr()
    assert main(["fit", *arguments]) == (0 if said else 2)
    assert ("num_tokens 5, as in the text" in caplog.text) == said
    if not said:
        text = "".join(capsys.readouterr())
        assert "expected 5 in `num_tokens` of the network, as in the data, got 6" in text


def test_a_config_keeps_its_number_for_its_own_text(tmp_path, capsys):
    trained(tmp_path)
    text = (tmp_path / "config.yaml").read_text().replace("num_tokens: 30", "num_tokens: 29")
    (tmp_path / "config.yaml").write_text(text)
    capsys.readouterr()
    assert main(["fit", "--config", str(tmp_path / "config.yaml")]) == 2
    assert "expected 30 in `num_tokens` of the network, as in the data, got 29" in "".join(capsys.readouterr())


def test_without_a_text_of_validation_a_fit_ends_well(tmp_path, capsys):
    trained(tmp_path, validation_fraction=0)
    assert "│ test" not in capsys.readouterr().out


def test_the_text_of_validation_is_not_called_a_test(tmp_path, capsys):
    trained(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert any("validation" in line for line in lines)
    assert not any("│ test" in line for line in lines)


def test_weights_of_another_vocabulary_are_refused(tmp_path, capsys):
    checkpoint = trained(tmp_path)
    config = tmp_path / "config.yaml"
    (tmp_path / "text.txt").write_text(TEXT.replace("e", "ā"))
    for command in (["fit", "--init_from"], ["test", "--pretrained"]):
        assert main([command[0], "--config", str(config), command[1], checkpoint]) == 2
        assert "expected data with the `vocabulary` that the weights of" in capsys.readouterr().err
