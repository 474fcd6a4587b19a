"""Files that are wrong: configs, data, checkpoints, weights, plans. One line that names the file, nothing written."""

import json
import pickle
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from tenzoo.compression import plan
from tenzoo.zoo.yaml_files import read_config
from tests.cli.refused import refused
from tests.cli.test_commands import CONFIG, config  # noqa: F401  (a fixture)
from tests.hostile import BOMBS, Bomb, little_memory, memory_bomb

ALIASES = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{','.join(['*' + chr(97 + k)] * 10)}]\n" for k in range(9)
)
YAML = {
    "empty": ("", "got nothing"),
    "comment": ("# nothing\n", "got nothing"),
    "list": ("- 1\n- 2\n", "got a list"),
    "words": ("just words", "got words"),
    "number": ("3", "got a number"),
    "markup": ("<html></html>", "got words"),
    "unclosed": ("model: [1,", "in line 2: did not find expected node content"),
    "json": ('{"model": ', "in line 2"),
    "tab": ("model:\n\trank: 3\n", "in line 2"),
    "colon": ("model: a: b\n", "in line 1"),
    "quote": ("model: 'a\n", "in line 2"),
    "indent": ("a:\n  b: 1\n c: 2\n", "in line 3"),
    "control": ("a: \x01b\n", "control characters"),
    "nul": ("a: \x00", "control characters"),
    "binary": (bytes(range(256)), "the byte 0x80 in line 2"),
    "latin": ("a: é\n".encode("latin-1"), "the byte 0xe9 in line 1"),
    "utf16": (CONFIG.encode("utf-16"), "the byte 0xff in line 1"),
    "key twice": (CONFIG + "model: {}\n", "each key once"),
    "inner key twice": (CONFIG.replace("rank: 2", "rank: 2, rank: 3"), "got 'rank' again in line 15"),
    "aliases": (ALIASES, "at most 100,000 values with all aliases resolved"),
    "cycle": ("a: &a [*a]\n", "got *a in line 1"),
    "unknown alias": ("a: *b\n", "got *b in line 1"),
    "deep": ("a: " + "[" * 200 + "]" * 200, "at most 50 levels"),
    "too deep": ("a: " + "[" * 5000, "in line 1"),
    "deep by lines": ("\n".join(" " * k + "a:" for k in range(300)), "at most 50 levels"),
    "long": ("a: " + "x" * 5_000, "at most 4,000 characters"),
    "huge": ("a: " + "x" * 5_000_000, "of 5,000,003 bytes"),
    "huge number": ("a: " + "9" * 4_500, "at most 4,000 characters"),
    "documents": ("a: 1\n---\nb: 2\n", "one document"),
    "code": ("a: !!python/object/apply:os.system ['touch trap']\n", "python/object/apply:os.system"),
    "set": ("a: !!set {x}\n", "tag"),
    "no int": ("a: !!int abc\n", "'abc'"),
    "long alias": ("a: *" + "b" * 5_000, "got *bbb"),
    "config in it": ("config: {a: 1}\n", "no key `config`"),
    "list as key": ("? [a, b]\n: 1\n", "names as keys"),
}
KEYS = {
    "int": ("1: 2\n", "Key must be a string, got: 1"),
    "bool": ("yes: 2\n", "Key must be a string, got: True"),
    "empty": ("'': 2\n", "Empty nested key"),
    "unknown": ("modle: 2\n", "'modle'"),
    "dotted": (
        "model.init_args.rank: 3\n",
        "`model`, got Namespace(init_args=Namespace(rank=3)): Not a valid subclass of Task",
    ),
    "nulls": ("model:\ndata:\n", "arguments are required: fit.data, fit.model"),
    "class path": (
        CONFIG.replace("class_path: tenzoo.tasks", "classpath: tenzoo.tasks"),
        "a dict with class_path entry",
    ),
    "init args": (CONFIG.replace("init_args: {factorization", "init_arg: {factorization"), "'init_arg'"),
    "no number": (CONFIG.replace("lr: 0.01", "lr: .nan"), "Invalid learning rate: nan"),
    "a key that is a number": ("1e400:", "a key or a number that cannot be read"),
    "a number without digits": ("a: !!int ''", "a key or a number that cannot be read"),
    **{
        f"a function of C: {name}": (
            "model:\n  class_path: CompletionTask\n  init_args: {factorization: cp, rank: 2, shape: [2, 2], optimizer: "
            f"{{class_path: {name}, init_args: {{lr: 1}}}}}}\ndata: {{class_path: CompletionDataModule}}\n",
            f"{name.partition('.')[2]}",
        )
        for name in ("math.sqrt", "math.hypot")
    },
    "sub-config": ("model: sub.yaml\n", "sub.yaml"),
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml(config, capsys, monkeypatch, kind):  # noqa: F811
    text, word = YAML[kind]
    path = config.parent / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(config.parent)
    with little_memory():
        refused(capsys, config.parent, ["fit", "--config", str(path)], [repr(str(path)), word])
    refused(capsys, config.parent, ["fit", f"--config={path.name}"], [repr(path.name), word])


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_yaml(config, capsys, monkeypatch, kind):  # noqa: F811
    text, word = KEYS[kind]
    (config.parent / "sub.yaml").write_text("a: 1\na: 2\n")
    config.write_text(text.replace("PATH", str(config.parent / "cube.npy")))
    monkeypatch.chdir(config.parent)
    refused(capsys, config.parent, ["fit", "--config", str(config)], [word])


@pytest.mark.parametrize(("option", "key"), [("-c", ""), ("--model", ""), ("--trainer.callbacks", "a: 1\n")])
def test_yaml_wherever_it_is_given(config, capsys, option, key):  # noqa: F811
    (path := config.parent / "bad.yaml").write_text(f"{key}rank: 1\nrank: 2\n")
    refused(
        capsys, config.parent, ["fit", "--config", str(config), option, str(path)], [repr(str(path)), "'rank' again"]
    )


def test_yaml_that_only_looks_strange(config, tmp_path, capsys):  # noqa: F811
    (path := tmp_path / "odd.yaml").write_bytes("\ufeffa: &a [1, é]\nb: *a\nc: {<<: &d {x: 1}, y: 1e-3}\n".encode())
    assert read_config(path) == {"a": [1, "é"], "b": [1, "é"], "c": {"x": 1, "y": 0.001}}


def test_what_the_parser_falls_over(config, capsys):  # noqa: F811
    """In a sub-config, where no key is known before it is merged."""
    (path := config.parent / "sub.txt").write_text("config: {a: 1}\n")
    refused(capsys, config.parent, ["fit", "--config", str(config), "--model", str(path)], ["expected "])


def data_file(path, kind):
    match kind:
        case "empty.npy":
            path.write_bytes(b"")
        case "truncated.npy":
            np.save(path, np.ones((6, 5, 4)))
            path.write_bytes(path.read_bytes()[:200])
        case "nan.npy":
            np.save(path, np.full((6, 5, 4), np.nan))
        case "objects.npy":
            np.save(path, np.array([Bomb(path.parent / "trap")], dtype=object), allow_pickle=True)
        case "complex.npy":
            np.save(path, np.ones((3, 3), dtype=complex))
        case "text.npy" | "text.npz" | "text.pt":
            path.write_text("six by five by four")
        case "dates.npy":
            np.save(path, np.array([["2020-01-01"] * 2] * 3, dtype="datetime64[D]"))
        case "names.npz":
            np.savez(path, a=np.ones(3), b=np.ones(3))
        case "negative.npz":
            np.savez(path, indices=np.array([[-1, 0]]), values=np.ones(1))
        case "uneven.npz":
            np.savez(path, indices=np.array([[1, 0]]), values=np.ones(2))
        case "dictionary.pt":
            torch.save({"a": torch.ones(3)}, path)
        case "code.pt":
            torch.save(Bomb(path.parent / "trap"), path)
        case "expanded.pt":
            torch.save(torch.zeros(1).expand(2**40), path)
        case "words.csv":
            path.write_text("0,1,good\n1,0,bad\n")
        case "semicolons.csv":
            path.write_text("0;1;2\n1;0;3\n")
        case "ragged.csv":
            path.write_text("0,1,2\n1,0\n")
        case "fractions.csv":
            path.write_text("0.5,1,2\n1,0,3\n")
        case "one.csv":
            path.write_text("1\n2\n")
        case "header.csv":
            path.write_text("i,j,v\n")
        case "pickle.csv":
            path.write_bytes(pickle.dumps([1, 2]))
        case "folder.npy":
            path.mkdir()
        case "table.xlsx":
            path.write_bytes(b"PK")


DATA = {
    "npy": ("empty", "truncated", "nan", "objects", "complex", "text", "dates", "folder"),
    "npz": ("names", "negative", "uneven", "text"),
    "pt": ("text", "dictionary", "code", "expanded"),
    "csv": ("words", "semicolons", "ragged", "fractions", "one", "header", "pickle"),
    "xlsx": ("table",),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", [f"{name}.{ending}" for ending, names in DATA.items() for name in names])
def test_data(config, capsys, monkeypatch, kind):  # noqa: F811
    data_file(path := config.parent / kind, kind)
    monkeypatch.chdir(config.parent)
    argv = ["fit", "--config", str(config), "--data.init_args.dataset", str(path)]
    with little_memory(2**30):
        refused(capsys, config.parent, argv, ["`dataset`"])


def checkpoint_file(path, kind):
    whole = {"state_dict": {"model.w": torch.ones(2)}, "global_step": 3, "epoch": 1, "pytorch-lightning_version": "2.6"}
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("weights")
        case "pickle":
            path.write_bytes(pickle.dumps({"state_dict": {}, "global_step": 1}))
        case "code":
            torch.save({**whole, "extra": Bomb(path.parent / "trap")}, path)
        case "tensor":
            torch.save(torch.ones(3), path)
        case "weights":
            torch.save(whole["state_dict"], path)
        case "no dictionary":
            torch.save({**whole, "state_dict": 3}, path)
        case "settings":
            torch.save({**whole, "hyper_parameters": [1]}, path)
        case "truncated":
            torch.save(whole, path)
            path.write_bytes(path.read_bytes()[:900])
        case "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("a.txt", "a")
        case "repeated":
            value = [1]
            for _ in range(64):
                value = [value, value]
            states = {"optimizer_states": [], "lr_schedulers": []}
            torch.save({**whole, **states, "hyper_parameters": {"rank": value}}, path)
        case _:
            memory_bomb(path, kind)


CHECKPOINTS = ("empty", "text", "pickle", "code", "tensor", "weights", "no dictionary", "settings", "truncated", "zip")


@pytest.mark.parametrize("kind", [*CHECKPOINTS, "repeated", *BOMBS])
def test_checkpoints(config, capsys, kind):  # noqa: F811
    checkpoint_file(path := config.parent / "bad.ckpt", kind)
    argv = ["fit", "--config", str(config), "--ckpt_path", str(path)]
    words = [repr(str(path)), *([] if kind == "repeated" else ["`ckpt_path`"])]
    with little_memory(2**33 if kind == "buffer" else 2**27):
        refused(capsys, config.parent, argv, words)


def network():
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


def written():
    torch.manual_seed(0)
    made = plan(network(), factorization="tt", ranks=2)
    return json.loads(json.dumps(asdict(made)))


def changed(**values):
    content = written()
    content["layers"][0].update(values)
    return content


PLANS = {
    "empty": b"",
    "text": b"plan",
    "binary": bytes(range(256)),
    "cut": json.dumps(changed()).encode()[:200],
    "list": b"[]",
    "deep": b"[" * 100_000,
    "huge number": b'{"layers": ' + b"9" * 10_000 + b"}",
    "no layers": b"{}",
    "layers of text": b'{"layers": "abc"}',
    "key twice": json.dumps(changed()).encode().replace(b'"rank":', b'"rank": [9], "rank":', 1),
    "no rank": json.dumps(changed(rank=[])).encode(),
    "rank 0": json.dumps(changed(rank=[0, 0, 0])).encode(),
    "rank of text": json.dumps(changed(rank="12")).encode(),
    "rank true": json.dumps(changed(rank=True)).encode(),
    "name": json.dumps(changed(name=3)).encode(),
    "another layer": json.dumps(changed(name="conv")).encode(),
    "format": json.dumps(changed(factorization="svd")).encode(),
    "no format": json.dumps(changed(factorization=None)).encode(),
    "shape": json.dumps(changed(shape=[8, 13])).encode(),
    "modes": json.dumps(changed(tensorization=[[2, 2], [2, 2]])).encode(),
    "huge rank": json.dumps(changed(rank=[1, 10**30, 1])).encode(),
    "error": json.dumps(changed(error="small")).encode(),
    "count": json.dumps(changed(parameters=-1)).encode(),
    "other": json.dumps({**written(), "other_parameters": "many"}).encode(),
    "more": json.dumps({**written(), "more": 1}).encode(),
}


@pytest.mark.parametrize("kind", PLANS)
def test_plans(tmp_path, capsys, monkeypatch, kind):
    (path := tmp_path / "plan.json").write_bytes(PLANS[kind])
    torch.save(network().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))\n"
    )
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))
    (config := tmp_path / "config.yaml").write_text(  # noqa: F811
        f"""
model:
  class_path: tenzoo.tasks.ImageClassificationTask
  init_args:
    network:
      class_path: tenzoo.models.CompressedNetwork
      init_args: {{network: own_network.Net, plan: {path}, weights: {tmp_path / "weights.pt"}}}
data: {{class_path: tenzoo.data.CIFAR10DataModule, init_args: {{root: nowhere}}}}
"""
    )
    monkeypatch.chdir(tmp_path)
    with little_memory():
        refused(capsys, tmp_path, ["describe", "--config", str(config)], ["expected "])
