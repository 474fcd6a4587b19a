"""Damaged configs and plans are refused in one line with their name, or read as what they say; nothing else happens."""

import copy
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from tenzoo.cli import main
from tenzoo.compression import Plan, restore_
from tenzoo.zoo.yaml_files import MAX_VALUES, read_config
from tests.fuzz import damaged, rounds
from tests.hostile import little_memory

CORPUS = Path(__file__).parents[1] / "corpus"
CONFIGS = [path.read_bytes() for path in sorted((CORPUS / "yaml").glob("*.yaml"))]
PLANS = [path.read_bytes() for path in sorted((CORPUS / "plans").glob("*.json"))]
_YAML = rb": |- |&a |*a|[|]|{|}|<<: |!!int |!!set |? |'|>|# |---|...|null|.nan|1e400|0x|1:2:3|%YAML 1.1|=|@|\\"
YAML_TOKENS = [
    *_YAML.split(b"|"),
    *(b"\n", b"\t", b'"', b"|\n", b"\xff", b"\x00", b"\xc3\xa9", b"\xef\xbb\xbf", b"9" * 5000, b"[" * 100),
]
_JSON = rb'null|true|-1|0|1e400|NaN|1.5|""|[]|{}|[|]|{|}|,|:|"|1|2|12|8|4|"layers":|"rank":|"name":|"tt"|"cp"|"0"|\u'
JSON_TOKENS = [*_JSON.split(b"|"), b"9" * 30, b"9" * 5000, b"[" * 2000, b"\xff", b"\x00"]
MINUTES = float(os.environ.get("TENZOO_FUZZ_MINUTES", "10"))
"""For each of the slow tests."""


def one_line(error: Exception, path: Path) -> None:
    """What a refusal has to be."""
    text = str(error)
    assert text.startswith("expected ")
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 500


def count(value: Any) -> int:
    """Values, with everything that aliases repeat."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(count, items))


def check_config(path: Path, dice: random.Random) -> None:
    path.write_bytes(data := damaged(dice.choice(CONFIGS), CONFIGS, YAML_TOKENS, dice))
    try:
        content = read_config(path)
    except ValueError as error:
        one_line(error, path)
        return
    assert isinstance(content, dict)
    assert count(content) <= MAX_VALUES
    reference = yaml.load(
        data.decode("utf-8-sig"), Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    )  # all values as text
    keys = {str(key).lower() for key in content if isinstance(key, str)}
    assert set(keys_of(reference)) >= keys


def keys_of(text: Any) -> Iterator[str]:
    """The keys of a mapping that was read as text, those that it merges included."""
    for part in text if isinstance(text, list) else [text]:
        for key, value in part.items() if isinstance(part, dict) else ():
            yield str(key).lower()
            if key == "<<":
                yield from keys_of(value)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


def check_plan(path: Path, dice: random.Random) -> None:
    path.write_bytes(damaged(dice.choice(PLANS), PLANS, JSON_TOKENS, dice))
    try:
        made = Plan.load(path)
    except ValueError as error:
        one_line(error, path)
        return
    assert str(made)
    made.save(again := path.with_suffix(".again"))
    assert Plan.load(again) == made
    again.unlink()
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, TypeError), match=r"^expected ") as caught:
        restore_(model, made, {})
    assert "\n" not in str(caught.value)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("check", [check_config, check_plan])
def test_a_few_hundred_damaged_files(tmp_path, check):
    for dice in rounds(number=300):
        with little_memory(2**29):
            check(tmp_path / "damaged", dice)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_config, check_plan])
def test_many_damaged_files(tmp_path, check):
    done = 0
    for dice in rounds(seconds=60 * MINUTES, seed=1_000_000):
        with little_memory(2**29):
            check(tmp_path / "damaged", dice)
        done += 1
    print(f"{done} files")


ODD = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        10**30,
        0.0,
        -0.5,
        float("nan"),
        float("inf"),
        "",
        "abc",
        "1e-3",
        "é",
        "a b",
        "null",
    ),
    *([], {}, [1], [[]], {"a": 1}, [None], {"class_path": "x"}, {"class_path": "torch.nn.Linear"}, "torch.nn.Linear"),
    *("config.yaml", "/", ".", "{}", "[", "math.sqrt", "tenzoo", {"init_args": {}}, {"class_path": 3, "init_args": 3}),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value can be replaced."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(place for key, inner in items for place in places(inner, (*path, key)))]


def odd(content: Any, dice: random.Random) -> Any:
    """A copy with one to three values replaced, removed or renamed."""
    content = copy.deepcopy(content)
    for _ in range(dice.randint(1, 3)):
        options = places(content)
        if not options:
            break
        *parents, last = dice.choice(options)
        inner = content
        for key in parents:
            inner = inner[key]
        match dice.randrange(4):
            case 0:
                del inner[last]
            case 1 if isinstance(inner, dict):
                inner[str(dice.choice(ODD))[:20]] = inner.pop(last)
            case _:
                inner[last] = dice.choice(ODD)
    return content


def check_command(path: Path, dice: random.Random, capsys: pytest.CaptureFixture[str]) -> None:
    """Values of all kinds where the parser, the classes and the data look at them."""
    content = odd(yaml.safe_load(dice.choice(CONFIGS)), dice)
    path.write_text(yaml.safe_dump(content))
    code = main(["describe", "--json", "--config", str(path)])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("tenzoo: error")]
    assert code in (0, 2), error
    assert len(lines) == (code == 2), error
    assert "Traceback" not in error
    assert all(len(line.replace(str(path.parent), "")) < 600 for line in lines)


def test_odd_values(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dice in rounds(number=12):
        check_command(tmp_path / "odd.yaml", dice, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.yaml"]


@pytest.mark.slow
def test_many_odd_values(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dice in rounds(seconds=60 * MINUTES, seed=1_000_000):
        check_command(tmp_path / "odd.yaml", dice, capsys)
