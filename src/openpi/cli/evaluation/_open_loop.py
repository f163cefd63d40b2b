"""`openpi evaluate DATASET`: a policy on recorded episodes, without a robot or a simulator."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from openpi.evaluation import open_loop
    from openpi.evaluation.open_loop import Asked, Played
    from openpi.training.config import TrainConfig
    from openpi.training.data.moments import Moments
    from openpi.training.data_config import DataConfig

_MAX_EPISODES = 8
_REFERENCE_FRAMES = 1000
_STRIDE = 10
REPORT_FILE = "report.html"


@dataclasses.dataclass(frozen=True)
class Args:
    """Compares a policy's chunks with recorded actions, beside baselines that learn nothing, and shows what it looks
    at. Of a checkpoint; with --host or --port of a running server, whose recipe the checkpoint or --config tells.

    Attributes:
        checkpoint: a step's folder, a run's folder (its latest complete step), or a URL.
        against: a second checkpoint, on the same frames and noise.
        config: recipe of a checkpoint that carries none, or of a server.
        host: of a running server, or its URL.
        port: of a running server; default: 8000, or 443 of wss://...
        api_key: of a running server; default: the environment variable OPENPI_API_KEY.
        output: folder for results.json and report.html; one that holds an evaluation is refused.
        episodes: numbers; default: those that the recipe holds out, else some of all.
        frames: at most so many.
        stride: frames from one chunk to the next; default: the horizon, 10 at most.
        samples: chunks per frame for the spread over noise; 1 = not measured.
        probes: frames for the spread, and for what the policy looks at; 0 = not measured.
        seed: of the noise.
        backend: default: PyTorch for model.safetensors, else JAX.
        num_steps: denoising steps; default: the model's (10).
    """

    checkpoint: str | None = None
    against: str | None = None
    config: str | None = None
    host: str | None = None
    port: int | None = None
    api_key: str | None = None
    output: Path = Path("evaluation")
    episodes: tuple[int, ...] = ()
    frames: int = 200
    stride: int | None = None
    samples: int = 4
    probes: int = 16
    seed: int = 0
    backend: Literal["jax", "pytorch"] | None = None
    num_steps: int | None = None

    @property
    def is_remote(self) -> bool:
        return (self.host, self.port) != (None, None)


def is_dataset(word: str) -> bool:
    """Whether it names a LeRobot dataset: a folder of one, or an identifier such as `lab/cubes`."""
    if (Path(word).expanduser() / "meta" / "info.json").is_file():
        return True
    return word.count("/") == 1 and ":" not in word and not word.startswith((".", "/", "~")) and not Path(word).exists()


def main(words: Sequence[str], program: str) -> int:
    """Raises what opening the dataset or a checkpoint raises; SystemExit for a bad command line."""
    import tyro
    from rich.console import Console

    from openpi.evaluation import open_loop_report
    from openpi.evaluation.episodes import RESULTS_FILE, check_free, write_json
    from openpi.shared import strict_json

    args = tyro.cli(Args, args=words[1:], prog=f"{program} DATASET")
    check_free(args.output, resume=False)
    results, page = evaluate(words[0], args)
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / RESULTS_FILE, strict_json.with_nulls(results))
    (args.output / REPORT_FILE).write_text(page, encoding="utf-8")
    Console().print(open_loop_report.terminal_table(results))  # the shared one may be on standard error
    if (compared := open_loop_report.comparison(results)) is not None:
        print(compared)
    print(f"report: {args.output / REPORT_FILE}")
    return 0


def evaluate(dataset: str, args: Args) -> tuple[dict[str, object], str]:
    """What was found, and the page about it."""
    import rich

    from openpi.evaluation import open_loop, open_loop_report
    from openpi.evaluation.progress import bar
    from openpi.training.data import moments as _moments

    for name, least in (("frames", 2), ("samples", 1), ("probes", 0), ("stride", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name} is {value}; expected at least {least}")
    config, data_config, trained_on = _recipe(dataset, args)
    episodes, held_out = _moments.chosen(config, data_config, args.episodes or None, _MAX_EPISODES)
    recordings = _moments.Moments(config, data_config, episodes)
    stride = args.stride or min(_STRIDE, config.model.action_horizon)
    if stride > config.model.action_horizon:
        raise ValueError(f"--stride is {stride}, and a chunk has {config.model.action_horizon} rows")
    plan = open_loop.Plan(stride, args.samples, args.probes, args.seed)
    moments = [recordings.at(*where) for where in open_loop.steps_of(recordings.lengths, stride, args.frames)]
    states, actions = _moments.others(config, data_config, episodes, _REFERENCE_FRAMES)
    found: dict[str, Any] = {
        "dataset": dataset, "episodes": list(dict.fromkeys(moment.episode for moment in moments)),
        "held_out": held_out, "trained_on": trained_on, "num_frames": len(moments),
        "stride": stride, "seed": args.seed, "joints": _joints(data_config, moments[0].recorded.shape[-1]),
        "baselines": {
            name: open_loop.summary(open_loop.errors(chunks, moments))
            for name, chunks in open_loop.baselines(moments, states, actions).items()
        },
        "policies": {},
    }  # fmt: skip
    played: list[tuple[str, Played]] = []
    for name, open_policy in _policies(config, args).items():
        asked = open_policy()
        with bar(rich.get_console(), len(moments)) as update:
            one = open_loop.play(asked, moments, plan, lambda n, u=update, t=name: u(n, t))
            found["policies"][name] = _measured(asked, one, plan, recordings)
        played.append((name, one))
    if len(played) == 2:
        a, b = (open_loop.errors(one.chunks, moments) for _, one in played)
        found["paired"] = open_loop.paired(a, b, moments)
    return found, open_loop_report.render(found, played, stride)


def _measured(asked: Asked, played: Played, plan: open_loop.Plan, recordings: Moments) -> dict[str, object]:
    from openpi.evaluation import open_loop
    from openpi.shared.evenly_spaced import evenly_spaced

    moments, chunks = played.moments, played.chunks
    found: dict[str, Any] = {
        "error": open_loop.summary(open_loop.errors(chunks, moments)),
        "smoothness": open_loop.smoothness(played, plan.stride),
        "undecodable": int(np.isnan(chunks).any(axis=(1, 2)).sum()),
    }
    probes = evenly_spaced(moments, plan.probes)
    if probes and plan.samples > 1:
        deviation, plain = open_loop.spread(asked, probes, plan)
        known = deviation[np.isfinite(deviation).all(axis=1)]
        if len(known):
            found["spread"] = {"mean": float(known.mean()), "per_joint": known.mean(0).tolist()}
        found["sensitivity"] = open_loop.sensitivity(asked, probes, plan, recordings.tasks, plain)
    return found


def _recipe(dataset: str, args: Args) -> tuple[TrainConfig, DataConfig, str | None]:
    """The checkpoint's recipe on the dataset that is asked for, its data half with the checkpoint's statistics, and the
    name of the dataset that training read, where it is another.
    """
    from openpi.policies import policy_config
    from openpi.training import recipe_io
    from openpi.training.data import recipe_data

    if args.is_remote and args.against:
        raise ValueError("--against is a checkpoint beside another; leave --host and --port out")
    if args.checkpoint is None and not (args.is_remote and args.config):
        raise ValueError("which policy? Give --checkpoint, or --host and --port with --config RECIPE")
    name = args.checkpoint or args.config
    assert name is not None
    config, checkpoint = recipe_io.resolve(name, args.config if args.checkpoint else None)
    trained_on = None if recipe_data.are_same(config.data.repo_id, dataset) else config.data.repo_id
    config = recipe_data.with_dataset(config, dataset)
    if checkpoint is None:
        return config, recipe_data.expanded(config), trained_on
    return config, policy_config.load_pipeline(config, checkpoint).data_config, trained_on


def _policies(config: TrainConfig, args: Args) -> dict[str, Callable[[], Asked]]:
    """By name, opened when they are first asked, so that one model is in memory at a time."""
    if args.is_remote:
        return {"the server": functools.partial(_remote, args)}
    assert args.checkpoint is not None
    names = [args.checkpoint, *([args.against] if args.against else [])]
    labels = dict.fromkeys([Path(name).name for name in names])
    shown = list(labels) if len(labels) == len(names) else names
    return {label: functools.partial(_local, name, args) for label, name in zip(shown, names, strict=True)}


def _local(checkpoint: str, args: Args) -> Asked:
    from openpi.cli.debugging.infer import load_policy
    from openpi.models.model_config import ModelType
    from openpi.training import recipe_io

    config, opened = recipe_io.resolve(checkpoint, args.config)
    options = {} if args.num_steps is None else {"num_steps": args.num_steps}
    policy = load_policy(config, opened, options, None, backend=args.backend)
    takes_seed = config.model.model_type is not ModelType.PI0_FAST

    def ask(observations: Sequence[Mapping[str, object]], seeds: Sequence[int]) -> list[np.ndarray | None]:
        told = [{"seed": seed} if takes_seed else {} for seed in seeds]
        answers = [policy.infer_batch([{**obs, **seed}])[0] for obs, seed in zip(observations, told, strict=True)]
        return [_chunk(answer) for answer in answers]

    return ask


def _remote(args: Args) -> Asked:
    from openpi_client.connection import api_key_of, usual_port
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    host, key = args.host or "127.0.0.1", api_key_of(args.api_key)
    policy = WebsocketClientPolicy(host, usual_port(host, args.port), api_key=key, max_age_s=None)
    # A published server hands every key to its transforms, which take no seed.
    takes_seed = policy.get_server_metadata().get("contract", {}).get("model_type") in ("pi0", "pi05")

    def ask(observations: Sequence[Mapping[str, object]], seeds: Sequence[int]) -> list[np.ndarray | None]:
        told = [{"seed": seed} if takes_seed else {} for seed in seeds]
        return [_chunk(policy.infer({**obs, **seed})) for obs, seed in zip(observations, told, strict=True)]

    return ask


def _chunk(answer: Mapping[str, object] | Exception) -> np.ndarray | None:
    """None where the model wrote none; any other error is raised."""
    from openpi.models.fast_codec import UndecodableActionsError

    if isinstance(answer, UndecodableActionsError):
        return None
    if isinstance(answer, Exception):
        raise answer
    return None if answer.get("held") else np.asarray(answer["actions"], np.float64)


def _joints(data_config: DataConfig, width: int) -> list[str]:
    from openpi.data.lerobot.features import dimension_names
    from openpi.policies.robot_spec import find_spec
    from openpi.training.data import recipe_data

    spec = find_spec(data_config.data_transforms.inputs)
    recorded = dimension_names(
        recipe_data.open_metadata(data_config).features.get(data_config.action_sequence_keys[0]) or {}
    )
    for names in (recorded, () if spec is None else spec.actions.names):
        if len(names) == width:
            return list(map(str, names))
    return [str(i) for i in range(width)]
