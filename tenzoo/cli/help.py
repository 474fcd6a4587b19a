"""``tenzoo --help``. It imports nothing heavy, so that it is there at once."""

from tenzoo import __version__

GROUPS = {
    "Train and judge": {
        "fit": "train the model of a config",
        "validate": "judge a checkpoint on the validation data",
        "test": "judge a checkpoint on the test data",
        "predict": "write what a checkpoint predicts to a file",
    },
    "The zoo": {
        "list": "show the models: sizes, results, and what composes over them",
        "describe": "show a model layer by layer: cores, ranks, operations",
        "copy": "write a config of the zoo to a file that you can edit",
        "init": "begin a project: a network, a task, data, a config, a test",
    },
    "Trained networks": {
        "save": "write a trained model as a folder with weights, settings and a card",
        "compress": "make a trained network smaller",
        "generate": "continue a prompt with a language model",
    },
    "The shell": {
        "completion": "print a script with which bash, zsh or fish completes words",
    },
}
"""All commands by what they are for, and what each does."""

_EXAMPLES = (
    "tenzoo fit --config covid_tucker",
    "tenzoo fit --config covid_tucker --config methods/das",
    "tenzoo fit --config covid_tucker --model.init_args.sam.rho 0.03",
    "tenzoo test --config covid_tucker --ckpt_path best",
)


def text() -> str:
    """The help, in lines of at most 80 columns."""
    groups = (
        "\n".join([f"{title}:", *(f"  {name:<11}{purpose}" for name, purpose in commands.items())])
        for title, commands in GROUPS.items()
    )
    examples = "\n".join(f"  {example}" for example in _EXAMPLES)
    return "\n\n".join(
        (
            "usage: tenzoo COMMAND [--config NAME_OR_FILE]... [OPTION]...",
            f"tenzoo {__version__}: tensorized networks, and the training of their cores.",
            *groups,
            "A config is a name of the zoo or a YAML file; several compose from left to\nright. "
            "tenzoo COMMAND --help shows the options of a command.",
            f"Examples:\n{examples}",
        )
    )
