"""What a type checker finds in a user's code, and that ``help`` begins with what a class is."""

import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typing_extensions import Unpack

from tenzoo.factorizations import FACTORIZATIONS, FactorizationName
from tenzoo.layers import TensorizedConv2d
from tenzoo.tasks import CompletionTask, DistillationTask, ImageClassificationTask, SupervisedTask, Task
from tenzoo.tasks.arguments import ClassificationArguments, SupervisedArguments, TaskArguments

ROOT = Path(__file__).parents[1]
USES = ROOT / "tests" / "typed_uses.py"


def test_mypy_finds_the_wrong_uses_and_no_others():
    """In a few seconds, with the cache of ``make lint``, which comes before the tests."""
    words = ["--strict", "--no-error-summary", "--hide-error-context", "--show-error-codes", str(USES)]
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.findall(rf"^{re.escape(str(USES.relative_to(ROOT)))}:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.M)
    lines = enumerate(USES.read_text(encoding="utf-8").splitlines(), start=1)
    wrong = [(str(number), line.partition("# wrong: ")[2]) for number, line in lines if "# wrong: " in line]
    assert sorted(found) == sorted(wrong), done.stdout + done.stderr
    assert len(done.stdout.splitlines()) >= len(wrong) > 10


@pytest.mark.parametrize(
    ("kind", "arguments", "left_out"),
    [
        (Task, TaskArguments, set()),
        (SupervisedTask, SupervisedArguments, {"network", "num_classes", "core_weight_decay", "norm_weight_decay"}),
        (ImageClassificationTask, ClassificationArguments, {"network"}),
    ],
)
def test_arguments_that_are_passed_on_are_those_of_the_base_class(kind, arguments, left_out):
    listed = get_type_hints(arguments)
    own = get_type_hints(kind.__init__)
    names = {name for name, each in inspect.signature(kind).parameters.items() if each.kind != each.VAR_KEYWORD}
    assert names - left_out <= set(listed)
    assert {name: listed[name] for name in names - left_out} == {name: own[name] for name in names - left_out}
    assert set(listed) - names <= set(get_type_hints(SupervisedArguments))


@pytest.mark.parametrize("kind", [CompletionTask, SupervisedTask, ImageClassificationTask, DistillationTask])
def test_the_command_line_finds_defaults_where_arguments_are_passed_on_to(kind):
    """It would take a ``TypedDict`` for them, which has none."""
    annotation = inspect.signature(kind).parameters["kwargs"].annotation
    assert not isinstance(annotation, type(Unpack[TaskArguments]))


def test_the_names_of_formats():
    names, text = get_args(FactorizationName)
    assert text is str
    shipped = {name for name, each in FACTORIZATIONS.items() if each.__module__.startswith("tenzoo.")}
    assert set(get_args(names)) == shipped - {name for name in shipped if "->" in name}


def test_help_begins_with_the_class_and_an_example():
    lines = [line.strip("| ") for line in pydoc.render_doc(TensorizedConv2d, renderer=pydoc.plaintext).splitlines()]
    text = inspect.cleandoc(TensorizedConv2d.__doc__).splitlines()
    assert lines[5 : 5 + len(text)] == [line.strip() for line in text]
    assert text.index("Example:") < text.index("Args:")
