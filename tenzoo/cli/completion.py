"""``tenzoo completion``: a script with which a shell completes commands, names of configs and options.

It imports nothing heavy, and the script asks it for nothing but the names of configs that are there at that time.
"""

from collections.abc import Sequence
from pathlib import Path

from tenzoo.cli.help import GROUPS

SHELLS = ("bash", "zsh", "fish")

_RUN = ("--config", "--print_config", "--help")
_JUDGE = ("--ckpt_path", "--pretrained")
_SETTINGS = (
    *("--seed_everything", "--trainer.max_epochs", "--trainer.max_steps", "--trainer.accelerator", "--trainer.devices"),
    *(
        "--trainer.precision",
        "--trainer.strategy",
        "--trainer.logger",
        "--trainer.callbacks+",
        "--trainer.log_every_n_steps",
    ),
    *("--trainer.default_root_dir", "--trainer.enable_progress_bar", "--model.init_args.sam.rho"),
    *("--model.init_args.rank", "--model.init_args.factorization", "--model.init_args.optimizer.init_args.lr"),
    *("--model.init_args.lr_scheduler", "--model.init_args.gradient_clip_val", "--data.init_args.batch_size"),
)

OPTIONS: dict[str, tuple[str, ...]] = {
    "fit": (*_RUN, *_JUDGE, "--init_from", *_SETTINGS),
    **dict.fromkeys(("validate", "test", "predict"), (*_RUN, *_JUDGE, *_SETTINGS)),
    "list": ("--configs", "--json", "--help"),
    "describe": ("--config", "--json", "--help"),
    "save": ("--ckpt_path", "--output", "--title", "--half", "--help"),
    "compress": (
        *("--config", "--network", "--weights", "--output", "--factorization", "--budget", "--ranks", "--exclude"),
        *("--calibration", "--calibration_size", "--refine", "--help"),
    ),
    "generate": ("--ckpt_path", "--prompt", "--length", "--temperature", "--help"),
}
"""The main options of commands; of those that train, there are hundreds more."""

_BASH = """\
# Completion of tenzoo in bash: eval "$(tenzoo completion bash)"
_tenzoo() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
    if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "COMMANDS" -- "$word"))
    elif [[ $before == --config || ${COMP_WORDS[1]} == copy ]]; then
        COMPREPLY=($(compgen -W "$(tenzoo completion names)" -- "$word") $(compgen -f -- "$word"))
    elif [[ $before == --ckpt_path ]]; then
        COMPREPLY=($(compgen -W "best last" -- "$word") $(compgen -f -- "$word"))
    elif [[ ${COMP_WORDS[1]} == completion ]]; then
        COMPREPLY=($(compgen -W "SHELLS" -- "$word"))
    elif [[ $word == -* ]]; then
        case ${COMP_WORDS[1]} in
CASES
        esac
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}
complete -o filenames -F _tenzoo tenzoo
"""

_ZSH = """\
# Completion of tenzoo in zsh: eval "$(tenzoo completion zsh)"
autoload -Uz bashcompinit && bashcompinit
"""


def script(shell: str) -> str:
    """The script for a shell.

    Raises:
        ValueError: For another shell.
    """
    if shell not in SHELLS:
        raise ValueError(
            f"expected one of {', '.join(SHELLS)} for tenzoo completion, got {repr(shell) if shell else 'none'}"
        )
    if shell == "fish":
        return _fish()
    cases = "\n".join(
        f'            {command}) COMPREPLY=($(compgen -W "{" ".join(options)}" -- "$word")) ;;'
        for command, options in OPTIONS.items()
    )
    text = _BASH.replace("COMMANDS", " ".join(_commands())).replace("SHELLS", " ".join(SHELLS)).replace("CASES", cases)
    return text if shell == "bash" else _ZSH + text.partition("\n")[2]


def _commands() -> dict[str, str]:
    return {name: purpose for commands in GROUPS.values() for name, purpose in commands.items()}


def _fish() -> str:
    lines = ["# Completion of tenzoo in fish: tenzoo completion fish | source"]
    for name, purpose in _commands().items():
        lines.append(f"complete -c tenzoo -n __fish_use_subcommand -f -a {name} -d '{purpose}'")
    for command, options in OPTIONS.items():
        seen = f"'__fish_seen_subcommand_from {command}'"
        for option in options:
            values = {"--config": " -r -a '(tenzoo completion names)'", "--ckpt_path": " -r -a 'best last'"}.get(
                option, ""
            )
            lines.append(f"complete -c tenzoo -n {seen} -l {option.removeprefix('--')}{values}")
    lines.append("complete -c tenzoo -n '__fish_seen_subcommand_from copy' -a '(tenzoo completion names)'")
    lines.append(f"complete -c tenzoo -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SHELLS)}'")
    return "\n".join(lines) + "\n"


def completion_command(argv: Sequence[str]) -> int:
    """Print a script, or for ``names`` those of all configs, one a line.

    Raises:
        ValueError: For anything else.
    """
    if list(argv) in (["-h"], ["--help"]):
        print(f'usage: tenzoo completion {{{",".join(SHELLS)}}}\n\nPrint a script: eval "$(tenzoo completion bash)"')
    elif list(argv) == ["names"]:
        print("\n".join(_names()))
    else:
        print(script(" ".join(argv)), end="")
    return 0


def _names() -> list[str]:
    package = Path(__file__).parents[1]
    root = next((path for path in (package / "configs", package.parent / "configs") if path.is_dir()), None)
    return (
        []
        if root is None
        else sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    )
