"""An error of a user's own code keeps its type, message, file and line, in one line, wherever it is raised."""

import re
import subprocess
import sys

import pytest

from tenzoo.cli import main
from tests.cli.test_commands import config, run  # noqa: F401  (config is a fixture)

IMPORTS = """import numpy
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from tenzoo.data import CompletionDataModule
from tenzoo.layers import TensorizedLinear
from tenzoo.tasks import CompletionTask
"""
INIT = "def __init__(self, factorization: str, rank: int, optimizer=None):"
CASES = {
    "attribute in init": ("model", f"CompletionTask/{INIT}/    self.not_there", "AttributeError"),
    "key in init": ("model", f"CompletionTask/{INIT}/    dict()['lost']", "KeyError: 'lost'"),
    "no message": ("model", f"CompletionTask/{INIT}/    assert rank > 5", "AssertionError"),
    "a value as torch says": ("model", f"CompletionTask/{INIT}/    raise ValueError('Invalid lr: 3')", "Invalid lr: 3"),
    "as a parser says": (
        "model",
        f"CompletionTask/{INIT}/    raise TypeError('No module named a')",
        "No module named a",
    ),
    "exit 0": ("model", f"CompletionTask/{INIT}/    raise SystemExit(0)", "SystemExit: 0"),
    "several lines": ("model", f"CompletionTask/{INIT}/    raise OSError('one\\ntwo')", "OSError: one two"),
    "memory": ("model", f"CompletionTask/{INIT}/    torch.empty(10**15)", "RuntimeError: [enforce fail"),
    "a library below": ("model", f"CompletionTask/{INIT}/    numpy.zeros(3).reshape(2)", "ValueError: cannot reshape"),
    "a keyword": ("model", f"CompletionTask/{INIT}/    super().__init__(fmt='cp')", "TypeError: "),
    "setup": ("model", "CompletionTask/def setup(self, stage):/    raise RuntimeError('s')", "RuntimeError: s"),
    "configure_model": ("model", "CompletionTask/def configure_model(self):/    open('/no/x')", "FileNotFoundError: "),
    "optimizers": ("model", "CompletionTask/def configure_optimizers(self):/    return dict()['k']", "KeyError: 'k'"),
    "torch's optimizer": (
        "model",
        "CompletionTask/def configure_optimizers(self):/    return torch.optim.Adam(self.parameters(), lr=-1)",
        "ValueError: Invalid learning rate: -1",
    ),
    "callback": ("trainer.callbacks+", "Callback/def __init__(self):/    import lost_package", "ModuleNotFoundError: "),
    "callback's setup": (
        "trainer.callbacks+",
        "Callback/def setup(self, trainer, pl_module, stage):/    raise TypeError('expected a shoe, got a hat')",
        "TypeError: expected a shoe, got a hat",
    ),
    "logger": ("trainer.logger", "CSVLogger/def __init__(self):/    1 / 0", "ZeroDivisionError: division by zero"),
    "loader": ("data", "CompletionDataModule/def train_dataloader(self):/    return undefined", "NameError: "),
    "data's setup": ("data", "CompletionDataModule/def setup(self, stage):/    raise KeyError", "KeyError"),
}
"""Option, then base, method and statement of the class that is given to it, and what the line ends with."""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module that can be imported until the test's end."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text):
        (tmp_path / "own_code.py").write_text(text)
        monkeypatch.delitem(sys.modules, "own_code", raising=False)
        return tmp_path / "own_code.py"

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    sys.modules.pop("own_code", None)


def said(capsys, code, expected=1):
    """The one line about an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert code == expected
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("case", CASES)
def test_type_message_file_and_line_are_kept(config, own, capsys, case):  # noqa: F811
    option, code, message = CASES[case]
    base, method, statement = code.split("/", 2)
    text = f"{IMPORTS}\n\nclass Own({base}):\n    {method}\n    {statement}\n"
    path = own(text)
    line = said(capsys, run("fit", config, f"--{option}={'own_code.Own'}"))
    name = method.removeprefix("def ").partition("(")[0]
    start = f"tenzoo: error in {path}:{text.count(chr(10))}, in Own.{name}: "
    assert line.startswith(start)
    assert message in line.removeprefix(start)
    assert not (config.parent / "runs").exists() or not list((config.parent / "runs").iterdir())


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        ("import torch\nimport lost_package\n", 2, "ModuleNotFoundError: No module named 'lost_package'"),
        ("import torch\n\ntorch.not_there\n", 3, "AttributeError: module 'torch' has no attribute 'not_there'"),
        ("def f(:\n", 1, "SyntaxError: invalid syntax"),
        ("raise RuntimeError('while it is imported')\n", 1, "RuntimeError: while it is imported"),
        ("raise SystemExit(3)\n", 1, "SystemExit: 3"),
    ],
    ids=["import", "attribute", "syntax", "own", "exit"],
)
@pytest.mark.parametrize("option", ["model", "data", "trainer.logger", "trainer.callbacks+", "model.optimizer"])
def test_a_module_that_cannot_be_imported(config, own, capsys, option, text, number, message):  # noqa: F811
    path = own(text)
    line = said(capsys, run("fit", config, f"--{option}=own_code.Own"))
    assert line == f"tenzoo: error in {path}:{number}: {message}"


@pytest.mark.parametrize("option", ["model", "data", "trainer.logger", "trainer.callbacks+", "model.optimizer"])
def test_a_class_of_another_kind(config, own, capsys, option):  # noqa: F811
    own(f"{IMPORTS}\n\nclass Own(LightningModule):\n    pass\n")
    line = said(capsys, run("fit", config, f"--{option}=own_code.Own"), 2)
    assert line.startswith(f"tenzoo: error: expected another value in `{option.rstrip('+')}`, got own_code.Own: ")
    assert re.search(r"to (?:be )?a subclass of \w+", line)


def test_what_tenzoo_refuses_of_ones_own_code(config, own, capsys):  # noqa: F811
    statement = "TensorizedLinear(4, 4, factorization='cp', rank=0)"
    text = f"{IMPORTS}\n\nclass Own(CompletionTask):\n    {INIT}\n        {statement}\n"
    path = own(text)
    line = said(capsys, run("fit", config, "--model=own_code.Own"), 2)
    assert line.startswith("tenzoo: error: expected ")
    assert line.endswith(f"in `rank`, got 0 (ValueError in {path}:{text.count(chr(10))}, in Own.__init__)")


def test_a_module_that_is_not_there(config, capsys):  # noqa: F811
    line = said(capsys, run("fit", config, "--model=nowhere_at_all.Own"), 2)
    assert "a class in `model`, one of CausalLMTask, CompletionTask," in line
    assert "'nowhere_at_all.Own'" in line


@pytest.mark.parametrize("command", ["describe", "list"])
def test_other_commands(config, own, capsys, command):  # noqa: F811
    path = own(f"{IMPORTS}\n\nclass Own(CompletionTask):\n    {INIT}\n        raise KeyError('k')\n")
    config.write_text(config.read_text().replace("tenzoo.tasks.CompletionTask", "own_code.Own"))
    argv = ["describe", "--config", str(config)] if command == "describe" else ["list", "--configs", str(config.parent)]
    line = said(capsys, main(argv))
    assert f"error in {path}:" in line
    assert "KeyError: 'k'" in line


def test_all_is_raised_where_it_is_asked_for(config, own, monkeypatch):  # noqa: F811
    own(f"{IMPORTS}\n\nclass Own(CompletionTask):\n    {INIT}\n        raise KeyError('k')\n")
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(BaseException, match="k"):
        run("fit", config, "--model=own_code.Own")


@pytest.mark.slow
def test_from_a_shell(config, tmp_path):  # noqa: F811
    (tmp_path / "own_code.py").write_text("import lost_package\n")
    command = [sys.executable, "-m", "tenzoo", "fit", "--config", str(config), "--model=own_code.Own"]
    environment = {"PATH": "", "PYTHONPATH": f"{tmp_path}:{':'.join(path for path in sys.path if path)}"}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert finished.returncode == 1
    assert finished.stderr.splitlines() == [
        f"tenzoo: error in {tmp_path / 'own_code.py'}:1: ModuleNotFoundError: No module named 'lost_package'"
    ]
