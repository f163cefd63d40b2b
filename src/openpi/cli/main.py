"""`openpi COMMAND ...`: dispatch on the first word, importing only the command that was asked for.

Packages add commands by the entry point `openpi.commands`: name -> a module as `Command` says.
"""

import importlib
import os
import sys
from typing import Protocol, cast

from openpi.cli import console
from openpi.shared import plugins

ENTRY_POINTS = "openpi.commands"

# folder -> command -> one line for `openpi --help`; the module is openpi.cli.<folder>.<command with _ for ->.
GROUPS = {
    "recipes": {
        "configs": "the registered recipes as a table, or one with its lab note",
        "init": "a recipe file for your own robot, drafted from its dataset",
        "fetch": "download what a recipe or a checkpoint needs, for a machine without a network",
    },
    "data": {
        "convert": "recordings in another format to a LeRobot dataset",
        "record": "demonstrations of a simulator's scripted expert, as a LeRobot dataset",
        "dataset": "whether a dataset is whole and of one kind, with a report",
        "stats": "normalisation statistics of a recipe's dataset, from its columns",
    },
    "training": {
        "train": "train a recipe",
        "tokenizer": "train an action tokenizer (FAST) on a recipe's own actions",
    },
    "serving": {
        "serve": "serve checkpoints to robots over websocket",
    },
    "evaluation": {
        "evaluate": "success of a policy in a simulator: intervals per task, videos, a report",
        "trials": "two policies on your robot, blind: success or score per trial, and the interval",
        "client-check": "how long answers take from here, and which loop that carries",
        "replay": "recorded requests to a server again, and the answers compared",
    },
    "checkpoints": {
        "export": "a LoRA checkpoint merged, without its base, or whole",
        "convert-checkpoint": "a checkpoint in another layout: JAX, PyTorch or LeRobot",
        "calibrate-fp8": "measures a checkpoint on its dataset, to serve it in FP8",
        "verify": "whether a checkpoint is whole and both backends agree on it",
    },
    "debugging": {
        "doctor": "whether a server, or a robot, sees what training saw; and whether this machine fits",
        "explain": "one sample through every stage of the pipeline",
        "infer": "one observation file -> one action chunk file",
    },
}
COMMANDS = {command: summary for group in GROUPS.values() for command, summary in group.items()}


# Whose checkpoints may bring code of their own.
LOAD_CHECKPOINTS = (
    *("train", "serve", "evaluate", "trials", "export", "convert-checkpoint", "calibrate-fp8", "verify", "doctor"),
    *("explain", "infer"),
)
TRUST_FLAG = "--trust-code"


class Command(Protocol):
    """A module with a command; importing it loads nothing heavy.

    Attributes:
        SUMMARY: one line for `openpi --help`.
    """

    SUMMARY: str

    def main(self, argv: list[str], /) -> int | None:
        """Runs it; returns the exit code, None for 0."""
        ...


def usage() -> str:
    installed = {name: _summary(name) for name in plugins.names(ENTRY_POINTS) if name not in COMMANDS}
    rows = "\n".join(f"  {name:<18} {summary}" for name, summary in {**installed, **COMMANDS}.items())
    return (
        f"usage: openpi COMMAND [options]\n\n{rows}\n\n`openpi COMMAND --help` lists the options of a command.\n"
        f"{TRUST_FLAG}, with a command that loads a checkpoint: run the recipe code that a downloaded one brings."
    )


def main(argv: list[str] | None = None) -> int:
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here, and not when Python ends, where nobody could tell why it fails
    except BrokenPipeError:
        if not console.stdout_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, *rest = argv
    known = (*COMMANDS, *plugins.names(ENTRY_POINTS)) if command not in COMMANDS else (command,)
    if command not in known:
        print(f"{usage()}\n\nopenpi: unknown command '{command}'{_hint(command, known)}", file=sys.stderr)
        return 2
    module = _load(command)
    if TRUST_FLAG in rest and command in LOAD_CHECKPOINTS:
        return _run_trusting(module, [word for word in rest if word != TRUST_FLAG])
    return int(module.main(rest) or 0)


def _load(command: str) -> Command:
    if command in COMMANDS:
        folder = next(folder for folder, group in GROUPS.items() if command in group)
        return cast(Command, importlib.import_module(f"openpi.cli.{folder}.{command.replace('-', '_')}"))
    return plugins.load(ENTRY_POINTS, command)


def _summary(command: str) -> str:
    """Of a package's command; one that is broken takes no other with it."""
    try:
        return _load(command).SUMMARY
    except Exception as error:
        return f"(cannot be loaded: {type(error).__name__}: {error})"


def _hint(command: str, known: tuple[str, ...]) -> str:
    import difflib

    close = difflib.get_close_matches(command, known, n=1)
    return plugins.hint(ENTRY_POINTS, command) or (f"; did you mean '{close[0]}'?" if close else "")


def _run_trusting(module: Command, argv: list[str]) -> int:
    """With the variable that recipes, workers and further processes look at."""
    from openpi.training.recipe.sources import TRUST_VARIABLE

    before = os.environ.get(TRUST_VARIABLE)
    os.environ[TRUST_VARIABLE] = "1"
    try:
        return int(module.main(argv) or 0)
    finally:
        if before is None:
            del os.environ[TRUST_VARIABLE]
        else:
            os.environ[TRUST_VARIABLE] = before


if __name__ == "__main__":
    sys.exit(main())
