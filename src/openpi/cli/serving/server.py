"""What `openpi serve` does, for every command line that ends in it: options -> models -> a server."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openpi.checkpoints import find
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.cli.console import check_range, command
from openpi.cli.serving._running import PROGRAM, run_server
from openpi.models.rtc_config import RtcConfig
from openpi.shared.frameworks import use_compilation_cache, wait_asleep
from openpi_client import image_tools
from openpi_client.connection import api_key_of

if TYPE_CHECKING:
    import ssl

    from openpi.policies.policy import Policy
    from openpi.serving.access import Limits
    from openpi.serving.catalog import Catalog
    from openpi.serving.protocols import ServerProtocol

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

logger = logging.getLogger(__name__)

_CAMERAS_AT_ONCE = 3


@dataclasses.dataclass(frozen=True)
class Args:
    """Serves checkpoints to robots over websocket.

    `openpi serve checkpoints/my_robot/first --host 0.0.0.0`; before there is one `openpi serve --dummy RECIPE --hold`.

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
        fp8: products in 8 bits, as `openpi calibrate-fp8` measured them; implies --backend pytorch.
        image_kernel: what resizes cameras to the model's size: exact, as in training; or torch, which is about five
            times as fast and one gray level off in 0.4 % of the values.
        max_batch: requests that wait are run together, so many at most; 1 = one at a time.
        batch_wait_ms: how long to wait for others after a batch of several; a lone client never waits.
        max_sessions: open at once; more are refused.
        max_message_mib: larger messages end their session.
        max_memory_mib: of the messages of all sessions together; default: 2048, or eight of the largest messages.
        idle_timeout_s: a session without requests for so long is closed; 0 = only when it has been so for an hour and
            its place is wanted.
        api_key: clients must send it; default: the environment variable OPENPI_API_KEY.
        allowed_host: name of this server that its machine does not have, such as that of a proxy before it.
        tls_cert: certificate chain (PEM), for wss:// and https://.
        tls_key: its private key (PEM).
        strict: refuse observations that do not look like those of training, instead of warning of them.
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
    fp8: bool = False
    image_kernel: Literal["exact", "torch"] = "exact"
    max_batch: int = 8
    batch_wait_ms: float = 2.0
    max_sessions: int = 320
    max_message_mib: int = 256
    max_memory_mib: int | None = None
    idle_timeout_s: float = 0.0
    api_key: str | None = None
    allowed_host: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    strict: bool = False
    debug: bool = False


def parse(argv: list[str] | None) -> Args:
    import tyro

    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.UseAppendAction)
    return tyro.cli(Args, args=argv, prog=PROGRAM, config=config)


@command(PROGRAM)
def serve(args: Args, *, protocols: Sequence[ServerProtocol] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C; returns the exit code.

    Args:
        protocols: instead of those that are installed, with the codec by its name.
    """
    from openpi.serving.model_thread import Batching
    from openpi.serving.protocols import installed
    from openpi.serving.recording import SessionRecorder

    for field, (lowest, highest) in RANGES.items():
        check_range(field, getattr(args, field), lowest, highest)
    chunking(args)
    key = api_key_of(args.api_key)
    options = {
        "protocols": installed(args.codec) if protocols is None else protocols,
        "tls": tls_context(args.tls_cert, args.tls_key),
        "limits": _limits(args),
        "batching": Batching(max_batch=args.max_batch, max_wait_s=args.batch_wait_ms / 1000),
        "max_models": args.max_models,
        "debug": args.debug,
        "allowed_hosts": args.allowed_host,
    }
    image_tools.use_kernel(args.image_kernel)
    image_tools.use_threads(min(_CAMERAS_AT_ONCE, os.cpu_count() or 1))
    models = find_models(args)
    options["recorder"] = SessionRecorder(args.record, args.record_format) if args.record else None
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
        refuses_suspicious=args.strict,
    )


def find_models(args: Args) -> Catalog:
    """What the command line offers. Checkpoints on this machine are looked for at once; what is at a URL is fetched
    when it is used.

    Raises:
        FileNotFoundError: there is no checkpoint; says what is there.
        ValueError: a further model is not written as NAME=PLACE.
        LookupError: the default model is none of them.
    """
    from openpi.serving.catalog import CheckpointCatalog
    from openpi.shared import download
    from openpi.training.recipe_io import recipe_name

    named = dict(_name_and_place(text) for text in args.model)
    name, recipe = _last_part(args.checkpoint), args.config
    if "://" in args.checkpoint:
        found = find.steps_in(args.checkpoint)
        steps = (lambda: found) if found else dict
        named = named if found else {name: args.checkpoint, **named}
    else:
        place = Path(args.checkpoint).expanduser()
        if not place.exists():  # `package:...`
            place = download.maybe_download(args.checkpoint)
        step = find.find_step(place)
        if step == place.resolve():
            steps = functools.partial(dict, {place.absolute().name: str(place)})
        else:
            steps = functools.partial(find.steps_in, place)
        recipe = recipe or recipe_name(step)
    described = {"config_name": recipe, "checkpoint_path": args.checkpoint, "experiment_name": name}
    catalog = CheckpointCatalog(functools.partial(load_policy, args), steps, named, args.default_model, described)
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
        find.find_step(place)
    return name, place


def _last_part(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2] or place


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """For a server with this certificate; None without one.

    Raises:
        ValueError: only one of the two is given, they do not belong together, or the key has a password.
        OSError: they cannot be read.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ValueError("--tls-cert and --tls-key go together; give both, or neither")
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)

    def refuse_to_ask() -> str:  # OpenSSL would, on the terminal of a service that has none
        raise ValueError(
            f"{key} has a password; a server cannot ask for it. Decrypt it: openssl pkey -in {key} -out ..."
        )

    try:
        context.load_cert_chain(certificate, key, refuse_to_ask)
    except ssl.SSLError as error:
        raise ValueError(f"{certificate} and {key} are no certificate and its key: {error.reason}") from error
    return context


def load_policy(args: Args, place: str | None = None) -> Policy:
    """A warm policy: what a robot gets from the first request on.

    Args:
        place: of the checkpoint, instead of that of the options.
    """
    use_compilation_cache()
    wait_asleep()
    checkpoint = Checkpoint.open(place or args.checkpoint)
    from openpi.policies import policy_config
    from openpi.serving.warm_up import warm_up
    from openpi.training.recipe_io import recipe_of

    recipe: Any = recipe_of(checkpoint, args.config)
    if args.dtype is not None:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype=args.dtype))
    logger.info("Loading %s", checkpoint)
    sample_kwargs = None if args.num_steps is None else {"num_steps": args.num_steps}
    policy = policy_config.create_trained_policy(
        recipe,
        checkpoint,
        default_prompt=args.default_prompt,
        sample_kwargs=sample_kwargs,
        on_undecodable=args.on_undecodable,
        backend=args.backend,
        pytorch_device=args.pytorch_device,
        rtc=chunking(args),
        fp8=args.fp8,
    )
    if policy.contract is not None:
        logger.info("The contract of this policy\n%s", policy.contract.describe())
        warm_up(policy, policy.contract.cameras, policy.contract.state)
    return policy
