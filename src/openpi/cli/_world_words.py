"""`WORLD [flags]` of `openpi evaluate` and `openpi record`: flags of the command and those of the world as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from openpi.envs.world import WorldConfig

Args = TypeVar("Args")


def parse(words: Sequence[str], kind: type[Args], program: str, usage: str) -> tuple[str, WorldConfig, Args]:
    """The world's name, the world, and the command's own arguments.

    Args:
        kind: a dataclass of the command's flags, whose docstring describes it.
        usage: of the command, after `WORLD`.
    Raises:
        ValueError, OSError, ImportError: there is no such world, or its fields have the names of the command's flags.
        SystemExit: a bad command line, or `--help`.
    """
    import tyro

    from openpi.envs import world

    if not words or words[0].startswith("-"):
        worlds = ", ".join(world.names())
        print(f"usage: {program} WORLD {usage}; worlds: {worlds}, or yours as my_world.py:MyWorld")
        print(f"`{program} WORLD --help` lists the options, those of the world too")
        raise SystemExit(0 if {"-h", "--help"} & set(words) else 2)
    name, *rest = words
    config: Any = world.find(name)
    ours: Any = kind
    if taken := {field.name for field in dataclasses.fields(config)} & {f.name for f in dataclasses.fields(ours)}:
        raise ValueError(f"world {name} has a field '{min(taken)}', which is an option of {program}; rename the field")
    both = dataclasses.make_dataclass("Both", [("arguments", ours), ("world", config)])
    summary = (kind.__doc__ or "").partition("\n\n")[0]  # the rest of it is told flag by flag
    parsed: Any = tyro.cli(
        both, args=rest, prog=f"{program} {name}", description=summary, config=(tyro.conf.OmitArgPrefixes,)
    )
    return name, parsed.world, parsed.arguments
