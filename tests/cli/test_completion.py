"""Scripts with which shells complete words."""

import shutil
import subprocess
import sys

import pytest

from tenzoo.cli import main
from tenzoo.cli.completion import OPTIONS, SHELLS, script
from tenzoo.cli.help import GROUPS
from tenzoo.zoo import catalog

COMPLETE = """
tenzoo() {{ [[ "$*" == "completion names" ]] && printf '%s\\n' covid_tucker methods/das methods/sam; }}
{script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_tenzoo
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("tenzoo co", ["compress", "completion", "copy"]),
        ("tenzoo fit --config methods/s", ["methods/sam"]),
        ("tenzoo copy covid", ["covid_tucker"]),
        ("tenzoo fit --trainer.max_", ["--trainer.max_epochs", "--trainer.max_steps"]),
        ("tenzoo test --ckpt_path b", ["best"]),
        ("tenzoo completion z", ["zsh"]),
        ("tenzoo list --con", ["--configs"]),
    ],
)
def test_bash_completes(tmp_path, words, found):
    text = COMPLETE.format(script=script("bash"), words=words)
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""
    assert sorted(done.stdout.split()) == sorted(found)


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_know_every_command(shell, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert text == script(shell)
    assert all(name in text for commands in GROUPS.values() for name in commands)
    if (program := shutil.which(shell)) is not None:
        assert subprocess.run([program, "-n"], input=text, text=True, capture_output=True).returncode == 0


def test_names_are_those_of_the_zoo(capsys):
    assert main(["completion", "names"]) == 0
    assert capsys.readouterr().out.split() == catalog.names()


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_options_are_there(command, capsys):
    """Those of classes are seen by every run of their own tests."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for option in OPTIONS[command]:
        assert option.removesuffix("+") in shown or "init_args" in option, option


def test_nothing_heavy_is_imported():
    code = "import sys; from tenzoo.cli import main; main(['completion', 'names']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
