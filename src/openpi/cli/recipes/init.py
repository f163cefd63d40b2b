"""`openpi init --dataset PATH_OR_ID`: a recipe file for a robot of your own, drafted from its LeRobot dataset.

Names in the dataset decide what they can: which camera shows the scene, what is the state, whether actions are
changes. What they do not decide is asked at the terminal, or becomes a marked line, FILL_IN(...), that has to be filled
in before the recipe loads. The file is yours and lies outside the package. Only the dataset's metadata decide; what is
odd in its tables is said at the end, as by `openpi dataset check`.
"""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from openpi.cli.console import command, make_parser

if TYPE_CHECKING:
    from openpi.cli.recipes._init_choices import Choice, Decision, Question
    from openpi.cli.recipes._init_source import Draft
    from openpi.data.lerobot.metadata import LeRobotMetadata

# The released models were trained with chunks of about a second, at most 50 steps.
_MAX_HORIZON = 50

Ask = Callable[[str], str]


@command("openpi init")
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    is_asked = not args.yes and sys.stdin.isatty() and sys.stdout.isatty()
    check_output(args.output, force=args.force)
    draft = make_draft(args.dataset, args.output.stem, ask=input if is_asked else None)
    text = write(draft, args.output)
    print(_report(args.output, text, draft.origin))
    print("\n".join(_found_in(args.dataset)))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi init", __doc__)
    parser.add_argument("--dataset", required=True, help="folder of a LeRobot dataset, or user/name on the hub")
    parser.add_argument("--output", type=Path, default=Path("my_robot.py"), help="file to write; default: my_robot.py")
    parser.add_argument("--yes", action="store_true", help="ask nothing; leave marked lines in the file")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    return parser


def check_output(path: Path, *, force: bool) -> None:
    """Refuses a file that is there, or that could not be imported under its name.

    Raises:
        FileExistsError, ValueError: the reason and the fix.
    """
    name = path.stem
    if path.suffix != ".py" or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"--output={path} is no name of a Python module; expected something like my_robot.py")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; name another file with --output, or replace it with --force")
    spec = importlib.util.find_spec(name)
    if spec is not None and (spec.origin is None or Path(spec.origin).resolve() != path.resolve()):
        raise ValueError(f"--output={path} has the name of another Python module; name it something like my_robot.py")


def make_draft(dataset: str, name: str, *, ask: Ask | None = None) -> Draft:
    """The recipe of a dataset.

    Args:
        dataset: folder or hub id.
        name: of the recipe, an identifier.
        ask: puts a question to a person and returns the answer; None = nobody is there.
    Raises:
        FileNotFoundError, ValueError: no dataset, or none that a policy could be trained on.
    """
    from openpi.cli.recipes import _init_choices
    from openpi.cli.recipes._init_source import Draft
    from openpi.data.lerobot.home import locate_dataset
    from openpi.data.lerobot.metadata import LeRobotMetadata

    root = locate_dataset(dataset)
    metadata = LeRobotMetadata.load(root)
    features = _init_choices.read_features(metadata)

    def settle(choice: Choice) -> Choice:
        return choice if ask is None else _answered(choice, ask)

    choices = _init_choices.choose(features, settle)
    has_tasks = any(str(task).strip() for task in metadata.tasks.values())
    if not has_tasks:
        hint = "It has no task texts."
        choices.append(settle(_init_choices.Question("PROMPT", "what is the robot told to do, in words?", hint)))
    return Draft(
        name=name,
        dataset=str(root.resolve()) if Path(dataset).expanduser().is_dir() else dataset,
        origin=_origin(metadata),
        robot=_robot_name(metadata),
        horizon=_horizon(metadata),
        vectors=_vectors_needed(choices, features.vectors),
        choices=choices,
        has_tasks=has_tasks,
    )


def write(draft: Draft, path: Path) -> str:
    """Writes the recipe, whole or not at all; returns its text."""
    from openpi.cli.recipes._init_source import source_of
    from openpi.shared import whole_file

    text = source_of(draft)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole_file.write_text(path, text)
    return text


def _answered(choice: Choice, ask: Ask) -> Choice:
    """The choice, decided by a person where it was open and the person wanted to."""
    from openpi.cli.recipes._init_choices import Decision, Question

    if not isinstance(choice, Question):
        return choice
    lines = [f"\n{choice.name}: {choice.question} {choice.hint}".rstrip()]
    lines += [f"  {i}  {option}" for i, option in enumerate(map(repr, choice.choices), start=1)]
    if choice.is_list:
        how = "numbers or names with commas between, - for none"
    else:
        how = "a number" if choice.choices else "the words"
    prompt = "\n".join([*lines, f"{how}; Enter to decide later, in the file: "])
    while True:
        try:
            answer = ask(prompt).strip()
        except EOFError:
            return choice
        if not answer:
            return choice
        try:
            return Decision(choice.name, _parsed(choice, answer), "your answer")
        except ValueError as error:
            prompt = f"{error}: "


def _parsed(question: Question, answer: str) -> object:
    if not question.choices:
        return answer
    if question.is_list and answer == "-":
        return ()
    options = {str(number): choice for number, choice in enumerate(question.choices, start=1)}
    options |= {str(choice): choice for choice in question.choices}
    if set(question.choices) == {True, False}:
        options |= {"y": True, "yes": True, "true": True, "n": False, "no": False, "false": False}
    given = [part.strip() for part in (answer.split(",") if question.is_list else [answer])]
    if not all(part in options for part in given):
        raise ValueError(f"'{answer}' is not understood; expected numbers from 1 to {len(question.choices)}, or names")
    chosen = tuple(options[part] for part in given)
    return chosen if question.is_list else chosen[0]


def _vectors_needed(choices: list[Choice], vectors: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Those that are state or actions, or may become so."""
    from openpi.cli.recipes._init_choices import Decision

    needed: set[str] = set()
    for choice in choices:
        if choice.name in ("STATE", "ACTION"):
            named = choice.value if isinstance(choice, Decision) else choice.choices
            needed |= {named} if isinstance(named, str) else set(named)
    return {key: names for key, names in vectors.items() if key in needed}


def _origin(metadata: LeRobotMetadata) -> str:
    return (
        f"LeRobot {metadata.version}: {len(metadata.episodes)} episodes, {metadata.num_frames} frames at "
        f"{metadata.fps:g} Hz."
        + "".join(f" No camera: '{key}' {reason}." for key, reason in metadata.unreadable.items())
    )


def _robot_name(metadata: LeRobotMetadata) -> str:
    """Also a folder's name."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", metadata.robot_type or metadata.root.name).strip("_")
    return slug or "robot"


def _horizon(metadata: LeRobotMetadata) -> Decision:
    from openpi.cli.recipes._init_choices import Decision

    shortest = min((episode.length for episode in metadata.episodes), default=_MAX_HORIZON)
    second = max(1, round(metadata.fps))
    steps = max(1, min(second, _MAX_HORIZON, shortest))
    reason = f"Steps of a chunk: a second is {second} at {metadata.fps:g} Hz, about what released models predict"
    if steps == shortest < second:
        reason += f"; but the shortest episode has {shortest} frames"
    elif steps < second:
        reason += f"; at most {_MAX_HORIZON}"
    return Decision("ACTION_HORIZON", steps, reason)


def _report(path: Path, text: str, origin: str) -> str:
    from openpi.training.recipe.fill_in import marked_lines

    lines = [origin, f"{path} is written."]
    marked = marked_lines(text)
    if marked:
        lines.append("The dataset does not decide these; fill them in before you train:")
        lines += [f"  line {number}: {name}" for number, name in marked.items()]
    lines.append("Read it, then:")
    lines += [
        f"  openpi stats {path}:tiny",
        f"  openpi explain {path}:tiny --index=0",
        f"  openpi train {path}:tiny --exp-name=try",
        f"  openpi train {path}:config --exp-name=first",
    ]
    return "\n".join(lines)


def _found_in(dataset: str) -> list[str]:
    """What the fast half of `openpi dataset check` says, a line for each kind of finding."""
    from openpi.cli.data.dataset import lines
    from openpi.data.check.runner import check_dataset, takes_long
    from openpi.data.lerobot.home import locate_dataset
    from openpi.data.lerobot.metadata import LeRobotMetadata

    root = locate_dataset(dataset)
    metadata = LeRobotMetadata.load(root, trust_totals=True)
    if takes_long(metadata.num_frames, len(metadata.episodes)):
        return [f"Its tables were not looked at, for their size; `openpi dataset check {dataset}` looks at all."]
    found = lines(check_dataset(root, decodes=False).findings)
    if not found:
        return [f"Its tables look well; `openpi dataset check {dataset}` looks at its pictures too."]
    more = f"`openpi dataset check {dataset} --report report.html` shows it, and looks at the pictures."
    return ["Look at the dataset before you train:", *(f"  {line}" for line in found), more]
