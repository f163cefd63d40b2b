"""`openpi serve DIR`: serves a checkpoint to robots.

The checkpoint says everything that is needed: weights, statistics, recipe and contract. Exit codes: 0 =
stopped by SIGTERM or Ctrl-C; 2 = bad command line; 1 = refused or failed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openpi.training.processor import wait_asleep

if TYPE_CHECKING:
    from openpi.training.config import TrainConfig
    from openpi_client.base_policy import BasePolicy

SUMMARY = "serve a checkpoint to robots over websocket"

API_KEY_VARIABLE = "OPENPI_API_KEY"

# What of a recipe changes how a checkpoint is served.
_SERVED_FIELDS = ("model", "data", "policy_metadata")

# A policy that is still compiling when the server stops is not waited for any longer than this.
_ABANDON_AFTER_S = 1.0

logger = logging.getLogger("openpi")


@dataclasses.dataclass(frozen=True)
class Args:
    """Serves a checkpoint to robots over websocket.

    Attributes:
        checkpoint: a step's folder, or a run's folder (its latest complete step is served); a URL is
            downloaded.
        config: recipe to use instead of the checkpoint's own.
        host: address to listen on; 0.0.0.0 opens the server to the network.
        port: 0 chooses a free one.
        port_file: file to write the port into once it is open.
        default_prompt: for requests that have no prompt.
        record: folder to record every request and answer in.
        num_steps: denoising steps per chunk.
        on_undecodable: what to answer when pi0-FAST wrote no action chunk: an error, or actions that stand still,
            marked with `held`.
        dtype: of the model's activations, instead of the recipe's.
        backend: what runs the model; default: PyTorch for model.safetensors, else JAX. Either runs every checkpoint.
        pytorch_device: such as cuda:1 or cpu; implies --backend pytorch.
        api_key: clients must send it; default: the environment variable OPENPI_API_KEY.
    """

    checkpoint: str
    config: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    default_prompt: str | None = None
    record: Path | None = None
    num_steps: int | None = None
    on_undecodable: Literal["error", "hold"] = "error"
    dtype: Literal["float32", "bfloat16"] | None = None
    backend: Literal["jax", "pytorch"] | None = None
    pytorch_device: str | None = None
    api_key: str | None = None


def main(argv: list[str] | None = None) -> int:
    from openpi.cli.console import configure_logging

    args = parse(argv)
    configure_logging()
    if "://" not in args.checkpoint:  # else it may take long: the port is open meanwhile
        try:
            find_checkpoint(args.checkpoint)
        except OSError as error:
            return refuse(error)
    load = functools.partial(
        load_policy,
        args.checkpoint,
        args.config,
        dtype=args.dtype,
        default_prompt=args.default_prompt,
        record=args.record,
        num_steps=args.num_steps,
        on_undecodable=args.on_undecodable,
        backend=args.backend,
        pytorch_device=args.pytorch_device,
    )
    return run_server(load, host=args.host, port=args.port, port_file=args.port_file, api_key=args.api_key)


def parse(argv: list[str] | None) -> Args:
    import tyro

    return tyro.cli(Args, args=argv, prog="openpi serve", config=(tyro.conf.PositionalRequiredArgs,))


def find_checkpoint(place: str) -> Path:
    """The folder of one step: `place` itself, or the numerically latest complete step in it.

    Raises:
        FileNotFoundError: there is no checkpoint; says what is there.
    """
    from openpi.shared import download
    from openpi.weights import safetensors_io

    folder = download.maybe_download(place)
    if (folder / "params").is_dir() or safetensors_io.is_here(folder):
        return folder
    complete = [file.parents[1].name for file in folder.glob("*/params/_METADATA")]
    complete += [entry.name for entry in folder.glob("*") if safetensors_io.is_here(entry)]
    steps = [int(name) for name in complete if name.isdigit()]
    if steps:
        return folder / str(max(steps))
    found = sorted(entry.name for entry in folder.iterdir())[:10] if folder.is_dir() else []
    raise FileNotFoundError(
        f"{folder} is neither a checkpoint (a folder with params/ or model.safetensors) nor the folder of a run "
        f"with complete steps in it (found: {', '.join(found) or 'nothing'})"
    )


def choose_recipe(checkpoint: Path, name: str | None) -> TrainConfig:
    """The recipe called `name`, else the checkpoint's own; logs where the two differ.

    Raises:
        FileNotFoundError: the checkpoint has no recipe, and none is named.
        ValueError: unknown name, or a damaged recipe.
    """
    from openpi.training import config, recipe_io

    if name is None:
        return recipe_io.load_recipe(checkpoint)
    named = config.get_config(name)
    try:
        saved = recipe_io.load_recipe(checkpoint)
    except FileNotFoundError:
        return named
    for field in _SERVED_FIELDS:
        for line in differences(getattr(saved, field), getattr(named, field), field):
            logger.warning("recipe '%s' differs from the checkpoint's: %s", name, line)
    return named


def differences(saved: Any, named: Any, path: str) -> list[str]:
    """One line for every field, however nested, in which two dataclasses differ."""
    if type(saved) is type(named) and dataclasses.is_dataclass(saved):
        return [
            line
            for field in dataclasses.fields(saved)
            for line in differences(getattr(saved, field.name), getattr(named, field.name), f"{path}.{field.name}")
        ]
    if saved is named or repr(saved) == repr(named):
        return []
    return [f"{path} is {named!r}, the checkpoint was trained with {saved!r}"]


def with_dtype(recipe: TrainConfig, dtype: str | None) -> TrainConfig:
    """The recipe with another activation dtype; itself when `dtype` is None."""
    if dtype is None:
        return recipe
    model: Any = recipe.model
    return dataclasses.replace(recipe, model=dataclasses.replace(model, dtype=dtype))


def load_policy(
    place: str,
    config: str | None = None,
    *,
    dtype: str | None = None,
    default_prompt: str | None = None,
    record: Path | None = None,
    num_steps: int | None = None,
    on_undecodable: Literal["error", "hold"] = "error",
    backend: Literal["jax", "pytorch"] | None = None,
    pytorch_device: str | None = None,
) -> BasePolicy:
    """A warm policy: what a robot gets from the first request on. Arguments as in `Args`."""
    checkpoint = find_checkpoint(place)
    recipe = with_dtype(choose_recipe(checkpoint, config), dtype)
    # Set before JAX is imported: a restarted server then compiles nothing anew.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/jax").expanduser()))
    wait_asleep()
    from openpi.policies import policy_config
    from openpi.policies.policy import PolicyRecorder
    from openpi.policies.robot_spec import find_spec
    from openpi.serving.warm_up import warm_up

    logger.info("Loading %s", checkpoint)
    sample_kwargs = None if num_steps is None else {"num_steps": num_steps}
    policy = policy_config.create_trained_policy(
        recipe,
        checkpoint,
        default_prompt=default_prompt,
        sample_kwargs=sample_kwargs,
        on_undecodable=on_undecodable,
        backend=backend,
        pytorch_device=pytorch_device,
    )
    if policy.contract is not None:
        logger.info("The contract of this policy\n%s", policy.contract.describe())
    robot = policy.contract or find_spec(recipe.data.create(recipe.assets_dirs, recipe.model).data_transforms.inputs)
    if robot is not None:
        warm_up(policy, robot.cameras, robot.state)
    return policy if record is None else PolicyRecorder(policy, str(record))


def run_server(
    load: Callable[[], BasePolicy],
    *,
    host: str,
    port: int,
    port_file: Path | None = None,
    api_key: str | None = None,
) -> int:
    """Serves what `load` makes until SIGTERM or Ctrl-C; returns the exit code."""
    from openpi.serving.server import PolicyServer

    server = PolicyServer(
        load,
        host=host,
        port=port,
        api_key=api_key or os.environ.get(API_KEY_VARIABLE),
        on_listening=functools.partial(announce, host, port_file),
    )
    try:
        asyncio.run(server.run())
        code = 0
    except (ValueError, KeyError, OSError, ImportError) as error:
        code = refuse(error)
    except Exception:
        logger.exception("The server failed")
        code = 1
    if not server.finish_thread(_ABANDON_AFTER_S):
        # Leaving the interpreter while a thread compiles can crash it; nothing here is left to be cleaned up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def announce(host: str, port_file: Path | None, port: int) -> None:
    """Says where the server is: in `port_file` (whole or not at all), and in the log."""
    if port_file is not None:
        partial = port_file.with_name(f".{port_file.name}.partial")
        partial.write_text(f"{port}\n")
        partial.rename(port_file)
    logger.info("Policy server on ws://%s:%d; health: http://%s:%d/healthz", host, port, host, port)
    if host in ("0.0.0.0", "::"):
        logger.info("Reachable from the network as %s", _network_names())


def _network_names() -> str:
    import socket

    name = socket.gethostname()
    try:
        return f"{name} ({socket.gethostbyname(name)})"
    except OSError:  # A host name that nobody resolves is no reason not to serve.
        return name


def refuse(error: BaseException) -> int:
    """Prints why, without a traceback; returns the exit code."""
    logger.debug("", exc_info=error)
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    message = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else message
    print(f"openpi serve: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
