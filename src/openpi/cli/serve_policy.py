"""The documented `scripts/serve_policy.py`: serves a checkpoint by recipe name, or the default of a robot.

    serve_policy.py --env DROID
    serve_policy.py --port 8000 policy:checkpoint --policy.config=pi05_droid --policy.dir=gs://.../pi05_droid

It listens on all addresses, as documented; `openpi serve` listens on this machine unless told otherwise.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from openpi.cli import serve

if TYPE_CHECKING:
    from openpi_client.base_policy import BasePolicy

PROGRAM = "serve_policy.py"

_CHECKPOINTS = "gs://openpi-assets/checkpoints"
_RECORD_FOLDER = Path("policy_records")

logger = logging.getLogger("openpi")


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
    """Form of the first release, whose exported models are no longer published; says what replaces them.

    Attributes:
        dir: folder or URL of the exported model.
        processor: name of its normalisation.
    """

    dir: str
    processor: str | None = None


@dataclasses.dataclass(frozen=True)
class Args:
    """Serves a policy to robots over websocket.

    Attributes:
        env: the robot whose default is served; only for policy:default.
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

# Exported models of the first release -> the checkpoint of the same training.
_REPLACEMENTS = {
    "pi0_aloha_sim": DEFAULT_CHECKPOINT[EnvMode.ALOHA_SIM],
    "pi0_aloha_towel": Checkpoint("pi0_aloha_towel", f"{_CHECKPOINTS}/pi0_aloha_towel"),
    "pi0_aloha": Checkpoint("pi0_aloha", f"{_CHECKPOINTS}/pi0_base"),
    "pi0_base": Checkpoint("pi0_aloha", f"{_CHECKPOINTS}/pi0_base"),
    "pi0_droid": Checkpoint("pi0_droid", f"{_CHECKPOINTS}/pi0_droid"),
    "pi0_libero": DEFAULT_CHECKPOINT[EnvMode.LIBERO],
}


def main(argv: list[str] | None = None) -> int:
    from openpi.cli.console import configure_logging

    args = parse(argv)
    configure_logging()
    try:
        chosen = choose_checkpoint(args)
        check(chosen, args.port)
    except (ValueError, OSError) as error:
        return serve.refuse(error, PROGRAM)
    load = functools.partial(
        load_policy,
        chosen,
        args.default_prompt,
        record=args.record,
        backend=args.backend,
        pytorch_device=args.pytorch_device,
    )
    return serve.run_server(load, host="0.0.0.0", port=args.port, program=PROGRAM)


def check(chosen: Checkpoint, port: int) -> None:
    """What can be told before the port is open; a URL is fetched afterwards.

    Raises:
        FileNotFoundError: there is no checkpoint in the folder; says what is there.
        ValueError: no recipe of that name, or no such port.
    """
    from openpi.training.config import get_config

    serve.check_range("port", port, *serve.RANGES["port"])
    get_config(chosen.config)
    if "://" not in chosen.dir:
        serve.find_checkpoint(chosen.dir)


def load_policy(
    chosen: Checkpoint,
    default_prompt: str | None,
    *,
    record: bool,
    backend: Literal["jax", "pytorch"] | None = None,
    pytorch_device: str | None = None,
) -> BasePolicy:
    """The policy, warm; one that records all requests in one folder, as documented, if asked to."""
    from openpi.policies.policy import PolicyRecorder

    policy = serve.load_policy(
        chosen.dir, chosen.config, default_prompt=default_prompt, backend=backend, pytorch_device=pytorch_device
    )
    return PolicyRecorder(policy, _RECORD_FOLDER) if record else policy


def parse(argv: list[str] | None) -> Args:
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    return tyro.cli(Args, args=with_env_in_capitals(argv), prog=PROGRAM)


def choose_checkpoint(args: Args) -> Checkpoint:
    """What the command line asks for.

    Raises:
        ValueError: it asks for something of the first release that is no longer published.
    """
    match args.policy:
        case Checkpoint():
            return args.policy
        case Default():
            if args.env is EnvMode.CALVIN:
                raise ValueError(
                    "there is no published checkpoint for CALVIN since the first release; train one with the recipe "
                    "pi0_calvin, then use policy:checkpoint --policy.config=pi0_calvin --policy.dir=..."
                )
            return DEFAULT_CHECKPOINT[args.env]
        case Exported(folder):
            raise ValueError(_replacement_of(folder))


def _replacement_of(folder: str) -> str:
    parts = folder.rstrip("/").removesuffix("/model").rsplit("/", 1)
    replacement = _REPLACEMENTS.get(parts[-1])
    if replacement is None:
        hint = f"there are {', '.join(sorted(_REPLACEMENTS))}"
    else:
        hint = f"use policy:checkpoint --policy.config={replacement.config} --policy.dir={replacement.dir}"
    return f"exported models such as {folder} are no longer published and cannot be served; {hint}"


def with_env_in_capitals(argv: list[str]) -> list[str]:
    """`--env droid`, `--env=droid` -> `DROID`: the names are capitals, but any case is accepted."""
    fixed = list(argv)
    for i, word in enumerate(fixed):
        if word.startswith("--env="):
            fixed[i] = "--env=" + word.removeprefix("--env=").upper()
        elif i > 0 and fixed[i - 1] == "--env":
            fixed[i] = word.upper()
    return fixed


if __name__ == "__main__":
    sys.exit(main())
