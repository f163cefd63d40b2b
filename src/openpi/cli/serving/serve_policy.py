"""The documented `scripts/serve_policy.py`: serves a checkpoint by recipe name, or the default of a robot.

    serve_policy.py --env DROID
    serve_policy.py --port 8000 policy:checkpoint --policy.config=pi05_droid --policy.dir=gs://.../pi05_droid

It listens on all addresses, as documented; `openpi serve` listens on this machine unless told otherwise.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from openpi.checkpoints.find import find_step
from openpi.cli.console import check_range, command, configure_logging
from openpi.cli.serving import server
from openpi.cli.serving._running import run_server
from openpi.shared.frameworks import use_compilation_cache

if TYPE_CHECKING:
    from openpi_client.base_policy import BasePolicy

PROGRAM = "serve_policy.py"

_CHECKPOINTS = "gs://openpi-assets/checkpoints"
_RECORD_FOLDER = Path("policy_records")


class EnvMode(enum.Enum):
    """Robots that have a default checkpoint; CALVIN had one in the first release."""

    ALOHA = "aloha"
    ALOHA_SIM = "aloha_sim"
    DROID = "droid"
    LIBERO = "libero"
    CALVIN = "calvin"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Serves a checkpoint.

    Attributes:
        config: name of the recipe it was trained with.
        dir: its folder or URL.
    """

    config: str
    dir: str


@dataclasses.dataclass(frozen=True)
class Default:
    """Serves the default checkpoint of the robot that --env names."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """Serves an exported model of the first release to the robot that --env names.

    Attributes:
        dir: folder or URL of the exported model; default: the one of the robot.
        processor: name of its normalisation; default: the one of the robot, else the only one.
    """

    dir: str | None = None
    processor: str | None = None


@dataclasses.dataclass(frozen=True)
class Args:
    """Serves a policy to robots over websocket.

    Attributes:
        env: the robot whose default is served, and whose observations an exported model gets.
        default_prompt: for requests that have no prompt.
        port: port to listen on, on all addresses.
        record: record every request and answer in policy_records/.
        policy: what to serve.
        backend: what runs the model; default: PyTorch for model.safetensors, else JAX.
        pytorch_device: such as cuda:1 or cpu; implies --backend=pytorch.
    """

    env: EnvMode = EnvMode.ALOHA_SIM
    default_prompt: str | None = None
    port: int = 8000
    record: bool = False
    policy: Checkpoint | Default | Exported = dataclasses.field(default_factory=Default)
    backend: Literal["jax", "pytorch"] | None = None
    pytorch_device: str | None = None


DEFAULT_CHECKPOINT = {
    EnvMode.ALOHA: Checkpoint("pi05_aloha", f"{_CHECKPOINTS}/pi05_base"),
    EnvMode.ALOHA_SIM: Checkpoint("pi0_aloha_sim", f"{_CHECKPOINTS}/pi0_aloha_sim"),
    EnvMode.DROID: Checkpoint("pi05_droid", f"{_CHECKPOINTS}/pi05_droid"),
    EnvMode.LIBERO: Checkpoint("pi05_libero", f"{_CHECKPOINTS}/pi05_libero"),
}

# Exported models of the first release -> the checkpoint of the same training, for whom they are gone.
_REPLACEMENTS = {
    "pi0_aloha_sim": DEFAULT_CHECKPOINT[EnvMode.ALOHA_SIM],
    "pi0_aloha_towel": Checkpoint("pi0_aloha_towel", f"{_CHECKPOINTS}/pi0_aloha_towel"),
    "pi0_aloha": Checkpoint("pi0_aloha", f"{_CHECKPOINTS}/pi0_base"),
    "pi0_base": Checkpoint("pi0_aloha", f"{_CHECKPOINTS}/pi0_base"),
    "pi0_droid": Checkpoint("pi0_droid", f"{_CHECKPOINTS}/pi0_droid"),
    "pi0_libero": DEFAULT_CHECKPOINT[EnvMode.LIBERO],
}
_NO_CALVIN = (
    "there is no other published checkpoint for CALVIN; train one with the recipe pi0_calvin, then use "
    "policy:checkpoint --policy.config=pi0_calvin --policy.dir=..."
)


@command(PROGRAM)
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    configure_logging()
    return run_server(loader(args), host="0.0.0.0", port=args.port, program=PROGRAM)


def loader(args: Args) -> Callable[[], BasePolicy]:
    """What loads the policy, once all is checked that can be told before the port is open; a URL is fetched afterwards.

    Raises:
        FileNotFoundError: there is no checkpoint in the folder; says what is there.
        ValueError: no recipe of that name, no such port, or an option that an exported model does not have.
    """
    from openpi.training.config import get_config

    check_range("port", args.port, *server.RANGES["port"])
    chosen = choose_checkpoint(args)
    if isinstance(chosen, Checkpoint):
        get_config(chosen.config)
        if "://" not in chosen.dir:
            find_step(chosen.dir)
        same = {field: getattr(args, field) for field in ("default_prompt", "backend", "pytorch_device")}
        load = functools.partial(server.load_policy, server.Args(chosen.dir, config=chosen.config, **same))
    else:
        if args.backend == "pytorch" or args.pytorch_device is not None:
            raise ValueError("an exported model is a graph of JAX; leave out --backend and --pytorch-device")
        if chosen.dir is not None and "://" not in chosen.dir:
            find_exported(chosen.dir)
        load = functools.partial(load_exported, chosen, args.env, args.default_prompt)
    return functools.partial(_recorded, load) if args.record else load


def load_exported(chosen: Exported, env: EnvMode, default_prompt: str | None) -> BasePolicy:
    """The policy, warm.

    Raises:
        FileNotFoundError, ConnectionError: it is not there (any more); what replaces it is said.
        ValueError, ImportError: as of `openpi.policies.exported_policy.load`.
    """
    from openpi.policies import exported_policy
    from openpi.serving.warm_up import warm_up

    use_compilation_cache()
    robot = exported_policy.ROBOTS[env.value]
    place = robot.url if chosen.dir is None else chosen.dir
    try:
        folder = find_exported(place)
    except (FileNotFoundError, ConnectionError) as error:
        raise type(error)(f"{error}. {_replacement_of(place)}") from error
    policy = exported_policy.load(folder, robot, processor=chosen.processor, default_prompt=default_prompt)
    warm_up(policy, robot.spec.cameras, robot.spec.state)
    return policy


def find_exported(place: str) -> Path:
    """The folder of an exported model, here; raises FileNotFoundError where it has no graph."""
    from openpi.policies import exported_policy
    from openpi.shared import download

    folder = exported_policy.find(place)
    if folder is None:
        folder = download.maybe_download(place)
        found = sorted(path.name for path in folder.iterdir())[:10] if folder.is_dir() else []
        raise FileNotFoundError(
            f"{folder} is no exported model: it has no file 'graph' (found: {', '.join(found) or 'nothing'}). A "
            "checkpoint is served with policy:checkpoint --policy.config=... --policy.dir=..."
        )
    return folder


def _recorded(load: Callable[[], BasePolicy]) -> BasePolicy:
    """One that records all requests in one folder, as documented."""
    from openpi.policies.policy import PolicyRecorder

    return PolicyRecorder(load(), _RECORD_FOLDER)


def parse(argv: list[str] | None) -> Args:
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    return tyro.cli(Args, args=with_env_in_capitals(argv), prog=PROGRAM)


def choose_checkpoint(args: Args) -> Checkpoint | Exported:
    """What the command line asks for; CALVIN's default is still that of the first release."""
    if not isinstance(args.policy, Default):
        return args.policy
    return DEFAULT_CHECKPOINT.get(args.env) or Exported()


def _replacement_of(folder: str) -> str:
    name = folder.rstrip("/").removesuffix("/model").rsplit("/", 1)[-1]
    if name == "pi0_calvin":
        return f"Exported models of the first release may be gone; {_NO_CALVIN}"
    replacement = _REPLACEMENTS.get(name)
    if replacement is None:
        hint = f"published were {', '.join(sorted([*_REPLACEMENTS, 'pi0_calvin']))}"
    else:
        hint = f"use policy:checkpoint --policy.config={replacement.config} --policy.dir={replacement.dir}"
    return f"Exported models of the first release may be gone; {hint}"


def with_env_in_capitals(argv: list[str]) -> list[str]:
    """`--env droid`, `--env=droid` -> `DROID`: the names are capitals, but any case is accepted."""
    fixed = list(argv)
    for i, word in enumerate(fixed):
        if word.startswith("--env="):
            fixed[i] = "--env=" + word.removeprefix("--env=").upper()
        elif i > 0 and fixed[i - 1] == "--env":
            fixed[i] = word.upper()
    return fixed
