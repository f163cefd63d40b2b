"""`openpi serve DIR`: serves checkpoints to robots.

A checkpoint says everything that is needed: weights, statistics, recipe and contract. Exit codes: 0 =
stopped by SIGTERM or Ctrl-C; 2 = bad command line; 1 = refused or failed.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openpi.models.rtc_config import DEFAULT_RTC, RtcConfig
from openpi.shared.compilation_cache import use_compilation_cache
from openpi.training.processor import wait_asleep

if TYPE_CHECKING:
    import ssl

    from openpi.policies.policy import Policy
    from openpi.serving.access import Limits
    from openpi.serving.catalog import Catalog
    from openpi.serving.protocols import ServerProtocol
    from openpi.training.config import TrainConfig
    from openpi_client.base_policy import BasePolicy

SUMMARY = "serve checkpoints to robots over websocket"

PROGRAM = "openpi serve"
API_KEY_VARIABLE = "OPENPI_API_KEY"

# What of a recipe changes how a checkpoint is served.
_SERVED_FIELDS = ("model", "data", "policy_metadata")

# Whole ranges of the options that are numbers.
RANGES: Mapping[str, tuple[float, float]] = {
    "port": (0, 65535),
    "max_models": (1, math.inf),
    "num_steps": (1, math.inf),
    "max_batch": (1, math.inf),
    "batch_wait_ms": (0, math.inf),
    "max_sessions": (1, math.inf),
    "max_message_mib": (1, math.inf),
    "max_memory_mib": (1, math.inf),
    "idle_timeout_s": (0, math.inf),
}

# A policy that is still compiling when the server stops is not waited for any longer than this.
_ABANDON_AFTER_S = 1.0

logger = logging.getLogger("openpi")


@dataclasses.dataclass(frozen=True)
class Args:
    """Serves checkpoints to robots over websocket.

    Attributes:
        checkpoint: a step's folder, or a run's folder: its latest complete step is the default, the others are loaded
            when a client asks for them; a URL is downloaded.
        model: further checkpoints, NAME=PLACE each, such as adapters of another task; adapters over one base share it.
        default_model: step or name that clients get who ask for none.
        max_models: in memory at once; the least recently used makes room.
        config: recipe to use instead of the checkpoint's own.
        codec: of Positronic sessions (/api/v1/session), such as ee; without one, observations and actions pass as they
            are.
        host: address to listen on; 0.0.0.0 opens the server to the network.
        port: 0 chooses a free one.
        port_file: file to write the port into once it is open.
        default_prompt: for requests that have no prompt.
        record: folder to record every session in, for `openpi replay`.
        record_format: npy, a file per request in the published form; or mcap, a file per session that viewers such as
            Foxglove open (extra `recording`).
        num_steps: denoising steps per chunk.
        on_undecodable: what to answer when pi0-FAST wrote no action chunk: an error, or actions that stand still,
            marked with `held`.
        rtc: real-time chunking: how chunks go on from what a robot is still playing; default: trained, where the
            checkpoint was trained with delays, else guided. off = the server starts faster, and refuses it.
        rtc_schedule: how the weight of the chunk before falls, guided.
        rtc_clip: largest weight of the guidance; default: the number of denoising steps.
        rtc_jacobian: vjp, as published, takes a backward pass a step; identity takes none, and overshoots a little.
        dtype: of the model's activations, instead of the recipe's.
        backend: what runs the model; default: PyTorch for model.safetensors, else JAX. Either runs every checkpoint.
        pytorch_device: such as cuda:1 or cpu; implies --backend pytorch.
        max_batch: requests that wait are run together, so many at most; 1 = one at a time.
        batch_wait_ms: how long to wait for others after a batch of several; a lone client never waits.
        max_sessions: open at once; more are refused.
        max_message_mib: larger messages end their session.
        max_memory_mib: of the messages of all sessions together; default: 2048, or eight of the largest messages.
        idle_timeout_s: a session without requests for so long is closed; 0 = never.
        api_key: clients must send it; default: the environment variable OPENPI_API_KEY.
        allowed_host: name of this server that its machine does not have, such as that of a proxy before it.
        tls_cert: certificate chain (PEM), for wss:// and https://.
        tls_key: its private key (PEM).
        shared_memory: take the images of robots on this host from memory instead of the socket (Linux).
        debug: send whole tracebacks to clients.
    """

    checkpoint: str
    model: tuple[str, ...] = ()
    default_model: str | None = None
    max_models: int = 1
    config: str | None = None
    codec: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    default_prompt: str | None = None
    record: Path | None = None
    record_format: Literal["npy", "mcap"] = "npy"
    num_steps: int | None = None
    on_undecodable: Literal["error", "hold"] = "error"
    rtc: Literal["off", "guided", "trained"] | None = None
    rtc_schedule: Literal["exp", "linear", "ones", "zeros"] = "exp"
    rtc_clip: float | None = None
    rtc_jacobian: Literal["vjp", "identity"] = "vjp"
    dtype: Literal["float32", "bfloat16"] | None = None
    backend: Literal["jax", "pytorch"] | None = None
    pytorch_device: str | None = None
    max_batch: int = 8
    batch_wait_ms: float = 2.0
    max_sessions: int = 128
    max_message_mib: int = 256
    max_memory_mib: int | None = None
    idle_timeout_s: float = 3600.0
    api_key: str | None = None
    allowed_host: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    shared_memory: bool = False
    debug: bool = False


def main(argv: list[str] | None = None) -> int:
    from openpi.cli.console import configure_logging

    words = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--dummy" for word in words):
        from openpi.cli import serve_dummy

        return serve_dummy.main(words)
    args = parse(argv)
    configure_logging()
    return serve(args)


def parse(argv: list[str] | None) -> Args:
    import tyro

    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.UseAppendAction)
    return tyro.cli(Args, args=argv, prog=PROGRAM, config=config)


def serve(args: Args, *, protocols: Sequence[ServerProtocol] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C; returns the exit code.

    Args:
        protocols: instead of those that are installed, with the codec by its name.
    """
    from openpi.serving.batching import Batching
    from openpi.serving.protocols import installed
    from openpi.serving.recording import SessionRecorder

    try:
        check_ranges(args)
        key = served_key(args.api_key)
        options = {
            "protocols": installed(args.codec) if protocols is None else protocols,
            "tls": tls_context(args.tls_cert, args.tls_key),
            "limits": _limits(args),
            "batching": Batching(max_batch=args.max_batch, max_wait_s=args.batch_wait_ms / 1000),
            "max_models": args.max_models,
            "shared_memory": shared_memory_here(args.shared_memory),
            "debug": args.debug,
            "allowed_hosts": args.allowed_host,
        }
        models = find_models(args)
        options["recorder"] = SessionRecorder(args.record, args.record_format) if args.record else None
    except (ValueError, LookupError, OSError, ImportError) as error:
        return refuse(error)
    return run_server(models, host=args.host, port=args.port, port_file=args.port_file, api_key=key, options=options)


def _limits(args: Args) -> Limits:
    from openpi.serving.access import Limits
    from openpi.serving.scan import MessageLimits

    smallest = 4 * args.max_message_mib
    if args.max_memory_mib is not None and args.max_memory_mib < smallest:
        raise ValueError(
            f"--max-memory-mib is {args.max_memory_mib}; expected {smallest} or more, four of the largest messages "
            f"(--max-message-mib {args.max_message_mib})"
        )
    usual = MessageLimits()
    return Limits(
        max_message_bytes=args.max_message_mib * 2**20,
        max_sessions=args.max_sessions,
        idle_timeout_s=args.idle_timeout_s or None,
        max_memory_bytes=None if args.max_memory_mib is None else args.max_memory_mib * 2**20,
        message=dataclasses.replace(usual, max_observations=max(usual.max_observations, 4 * args.max_batch)),
    )


def check_ranges(args: Args) -> None:
    """Raises ValueError for a number that cannot be."""
    for field, (lowest, highest) in RANGES.items():
        check_range(field, getattr(args, field), lowest, highest)


def check_range(field: str, value: float | None, lowest: float, highest: float = math.inf) -> None:
    """Raises ValueError that names the option of this field, unless its value is in the range, or None."""
    if value is None or lowest <= value <= highest:
        return
    expected = f"{lowest} or more" if highest == math.inf else f"{lowest} to {highest}"
    raise ValueError(f"--{field.replace('_', '-')} is {value}; expected {expected}")


def find_models(args: Args) -> Catalog:
    """What the command line offers. Checkpoints on this machine are looked for at once; what is at a URL is fetched
    when it is used.

    Raises:
        FileNotFoundError: there is no checkpoint; says what is there.
        ValueError: a further model is not written as NAME=PLACE.
        LookupError: the default model is none of them.
    """
    from openpi.serving.catalog import Checkpoints, is_complete, steps_at, steps_in
    from openpi.shared import download

    load = functools.partial(
        load_policy,
        config=args.config,
        dtype=args.dtype,
        default_prompt=args.default_prompt,
        num_steps=args.num_steps,
        on_undecodable=args.on_undecodable,
        backend=args.backend,
        pytorch_device=args.pytorch_device,
        rtc=chunking(args),
    )
    named = dict(_name_and_place(text) for text in args.model)
    if "://" in args.checkpoint:
        found = steps_at(args.checkpoint)
        steps = (lambda: found) if found else dict
        named = named if found else {_last_part(args.checkpoint): args.checkpoint, **named}
    else:
        step = find_checkpoint(args.checkpoint)
        place = Path(args.checkpoint).expanduser()
        if not place.exists():  # `package:...`
            place = download.maybe_download(args.checkpoint)
        if is_complete(place) or step == place:
            steps = functools.partial(dict, {_last_part(str(place.absolute())): str(place)})
        else:
            steps = functools.partial(steps_in, place)
    described = {
        "config_name": args.config or _recipe_name(args.checkpoint),
        "checkpoint_path": args.checkpoint,
        "experiment_name": _last_part(args.checkpoint),
    }
    catalog = Checkpoints(load, steps, named, args.default_model, described)
    catalog.resolve(None)
    return catalog


def chunking(args: Args) -> RtcConfig | None:
    """Raises ValueError for a weight that cannot be."""
    if args.rtc == "off":
        return None
    return RtcConfig(args.rtc, args.rtc_schedule, args.rtc_clip, args.rtc_jacobian)


def _name_and_place(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise ValueError(f"--model {text} is not NAME=PLACE, such as fold=checkpoints/fold/20000")
    if "://" not in place:
        find_checkpoint(place)
    return name, place


def _last_part(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2] or place


def _recipe_name(place: str) -> str | None:
    """Of a checkpoint on this machine that brings its recipe."""
    from openpi.training.recipe_io import recipe_name

    try:
        return None if "://" in place else recipe_name(find_checkpoint(place))
    except OSError:
        return None


def served_key(given: str | None) -> str | None:
    """The key that is given, or that of the environment.

    Raises:
        ValueError: it is empty, or cannot be sent.
    """
    from openpi.serving.access import check_key

    key = os.environ.get(API_KEY_VARIABLE) if given is None else given
    check_key(key)
    return key


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """For a server with this certificate; None without one.

    Raises:
        ValueError: only one of the two is given, or they do not belong together.
        OSError: they cannot be read.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ValueError("--tls-cert and --tls-key go together; give both, or neither")
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ValueError(f"{certificate} and {key} are no certificate and its key: {error.reason}") from error
    return context


def shared_memory_here(is_wanted: bool) -> bool:
    """Raises OSError when it is wanted and not there."""
    from openpi_client import shared_memory

    if is_wanted and not shared_memory.is_supported():
        raise OSError("--shared-memory needs memory files (Linux), which this system does not have; leave it out")
    return is_wanted


def find_checkpoint(place: str) -> Path:
    """The folder of one step: `place` itself, or the numerically latest complete step in it.

    Raises:
        FileNotFoundError: there is no checkpoint; says what is there.
    """
    from openpi.serving.catalog import steps_in
    from openpi.shared import download
    from openpi.weights import safetensors_io

    folder = download.maybe_download(place)
    if (folder / "params").is_dir() or safetensors_io.is_here(folder):
        return folder
    if steps := steps_in(folder):
        return Path(list(steps.values())[-1])
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
    for field, before, now in recipe_io.changes_since(checkpoint, named):
        if field.partition(".")[0] in _SERVED_FIELDS:
            text = f"{field} is {now!r}, the checkpoint was trained with {before!r}"
            logger.warning("recipe '%s' differs from the checkpoint's: %s", name, text)
    return named


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
    num_steps: int | None = None,
    on_undecodable: Literal["error", "hold"] = "error",
    backend: Literal["jax", "pytorch"] | None = None,
    pytorch_device: str | None = None,
    rtc: RtcConfig | None = DEFAULT_RTC,
) -> Policy:
    """A warm policy: what a robot gets from the first request on. Arguments as in `Args`."""
    use_compilation_cache()
    wait_asleep()
    checkpoint = find_checkpoint(place)
    recipe = with_dtype(choose_recipe(checkpoint, config), dtype)
    from openpi.policies import policy_config
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
        rtc=rtc,
    )
    if policy.contract is not None:
        logger.info("The contract of this policy\n%s", policy.contract.describe())
    robot = policy.contract or find_spec(recipe.data.create(recipe.assets_dirs, recipe.model).data_transforms.inputs)
    if robot is not None:
        warm_up(policy, robot.cameras, robot.state)
    return policy


def run_server(
    models: Catalog | Callable[[], BasePolicy],
    *,
    host: str,
    port: int,
    port_file: Path | None = None,
    api_key: str | None = None,
    options: Mapping[str, Any] | None = None,
    program: str = PROGRAM,
) -> int:
    """Serves models, or what a function makes, until SIGTERM or Ctrl-C; returns the exit code.

    Args:
        options: further ones of `PolicyServer`.
        program: for messages.
    """
    from openpi.serving.server import PolicyServer

    options = options or {}
    scheme = "wss" if options.get("tls") else "ws"
    try:
        server = PolicyServer(
            models,
            host=host,
            port=port,
            api_key=served_key(api_key),
            on_listening=functools.partial(announce, host, port_file, scheme),
            **options,
        )
    except (ValueError, ImportError) as error:
        return refuse(error, program)
    try:
        server.run()
        code = 0
    except (ValueError, LookupError, OSError, ImportError) as error:
        code = refuse(error, program)
    except Exception:
        logger.exception("The server failed")
        code = 1
    if not server.finish_thread(_ABANDON_AFTER_S):
        # Leaving the interpreter while a thread compiles can crash it; nothing here is left to be cleaned up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def announce(host: str, port_file: Path | None, scheme: str, port: int) -> None:
    """Says where the server is: in `port_file` (whole or not at all), and in the log."""
    if port_file is not None:
        partial = port_file.with_name(f".{port_file.name}.partial")
        partial.write_text(f"{port}\n")
        partial.rename(port_file)
    page = f"{scheme.replace('ws', 'http')}://{host}:{port}"
    logger.info("Policy server on %s://%s:%d; status: %s; health: %s/healthz", scheme, host, port, page, page)
    if host in ("0.0.0.0", "::"):
        logger.info("Reachable from the network as %s", _network_names())


def _network_names() -> str:
    import socket

    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:  # A host name that nobody resolves is no reason not to serve.
        return name
    return name if ipaddress.ip_address(address).is_loopback else f"{name} ({address})"


def refuse(error: BaseException, program: str = PROGRAM) -> int:
    """Prints why, without a traceback; returns the exit code."""
    logger.debug("", exc_info=error)
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    message = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else message
    print(f"{program}: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
