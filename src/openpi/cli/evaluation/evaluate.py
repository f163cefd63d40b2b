"""`openpi evaluate WORLD`: closed-loop episodes of a policy in a simulator, over the wire as a robot would; and
`openpi evaluate DATASET`: its chunks beside recorded ones.

Exit codes: 0 = done; 2 = bad command line; 1 = refused or failed; 130 = stopped. What was played is kept: `--resume`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from openpi.cli import _world_words
from openpi.cli.console import STOPPED, reason
from openpi.cli.evaluation import _open_loop

if TYPE_CHECKING:
    from openpi.envs.world import WorldConfig
    from openpi.evaluation.asker import Asker
    from openpi.evaluation.episodes import Episode
    from openpi.evaluation.evaluate import Evaluation
    from openpi.evaluation.stats import Tally
    from openpi.evaluation.worlds import Done, Seat
    from openpi.policies.contract import Contract
    from openpi.shared.strict_json import Json

PROGRAM = "openpi evaluate"
_PATIENCE_S = 10.0


@dataclasses.dataclass(frozen=True)
class Args:
    """Plays closed-loop episodes in a world, over the wire as a robot would: of a checkpoint, which it serves, of a
    server that is running, or of the world's scripted expert. Options of `openpi serve` follow after `--`.

    Attributes:
        checkpoint: a step's folder, a run's folder (its latest complete step), or a URL.
        policy: the world's scripted expert, served under the contract of the world's recipe.
        host: of a running server, the published one too; or its URL.
        port: of a running server; default: 8000, or 443 of wss://...
        port_file: read the port from here, where `openpi serve --port-file` wrote it.
        api_key: of a running server; default: the environment variable OPENPI_API_KEY.
        compare: two checkpoints, played on the same seeds.
        output: folder for episodes, videos, results.json and report.html.
        resume: go on with the episodes that are in it.
        tasks: names or patterns, such as '*red*'; default: all.
        trials: episodes of each task.
        episodes: at most so many in all, tasks taking turns.
        seed: of the first trial of each task; the following count up from it.
        workers: worlds at once, each in a process; default: as many as cores, 8 at most.
        strategy: when the next chunk is asked for, and what becomes of the one that is being played.
        execute_horizon: rows of a chunk that are played before the policy is asked again; default: the world's.
        latency_ms: of each answer, on the world's clock.
        videos: episodes that are filmed, failures first.
        any_rate: play one row a tick although the policy was trained at another rate.
        ray: play on a Ray cluster, whose workers ask a running server: auto, host:6379, ray://host:10001, local.
    """

    checkpoint: str | None = None
    policy: Literal["expert"] | None = None
    host: str | None = None
    port: int | None = None
    port_file: Path | None = None
    api_key: str | None = None
    compare: tuple[str, str] | None = None
    output: Path = Path("evaluation")
    resume: bool = False
    tasks: tuple[str, ...] = ()
    trials: int = 10
    episodes: int | None = None
    seed: int = 0
    workers: int | None = None
    strategy: Literal["synchronous", "receding", "ensembling", "guided-rtc", "trained-rtc"] = "synchronous"
    execute_horizon: int | None = None
    latency_ms: float = 0.0
    videos: int = 8
    any_rate: bool = False
    ray: str | None = None

    @property
    def is_remote(self) -> bool:
        return (self.host, self.port, self.port_file) != (None, None, None)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    from websockets.exceptions import WebSocketException

    output: Path | None = None
    try:
        if words and _open_loop.is_dataset(words[0]):
            return _open_loop.main(words, PROGRAM)
        name, world, args = _world_words.parse(words[:cut], Args, PROGRAM, "[options]")
        output = args.output
        return _run(_plan(name, world, args), args, tuple(words[cut + 1 :]))
    except (ValueError, LookupError, OSError, RuntimeError, ImportError, WebSocketException) as error:
        print(f"{PROGRAM}: {reason(error)}{_kept(output)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: stopped; nothing keeps running{_kept(output)}", file=sys.stderr)
        return STOPPED


def _plan(name: str, world: WorldConfig, args: Args) -> Evaluation:
    """All that can be refused before anything starts."""
    from openpi.evaluation.episodes import check_free
    from openpi.evaluation.evaluate import Evaluation

    ways = [args.checkpoint, args.policy, args.compare, args.is_remote or None]
    if sum(way is not None for way in ways) != 1:
        raise ValueError("which policy? Give one of --checkpoint, --policy expert, --compare, or --host and --port")
    if args.ray and not args.is_remote:
        raise ValueError(
            "with --ray the workers of the cluster ask the policy themselves; start `openpi serve` where they reach it "
            "and give --host and --port"
        )
    if args.policy and world.expert() is None:
        raise ValueError(f"world {name} has no expert with these options")
    contract = _contract_of(world)
    same = ("tasks", "trials", "episodes", "seed", "strategy", "execute_horizon", "latency_ms", "videos", "any_rate")
    plan = Evaluation(
        name,
        world,
        recipe={} if contract is None else contract.as_metadata(),
        workers=min(8, os.cpu_count() or 1) if args.workers is None else args.workers,
        is_privileged=args.policy is not None,
        **{field: getattr(args, field) for field in same},
    )
    starts = {job.task.num_starts for job in plan.jobs if job.task.num_starts}
    if starts and (fewest := min(starts)) < args.trials:
        logging.getLogger(__name__).warning(
            "a task begins at %d places, and %d trials begin at some of them again: the intervals take them for "
            "independent, and are too narrow. Give --trials %d, or let the world draw where it begins",
            *(fewest, args.trials, fewest),
        )
    if args.compare is None:
        check_free(args.output, resume=args.resume)
    else:
        if not args.resume:
            check_free(args.output, resume=False)
        for name in "ab":
            check_free(args.output / name, resume=args.resume)
    for place in (*([args.checkpoint] if args.checkpoint else []), *(args.compare or ())):
        _check_fit(place, plan)
    return plan


def _contract_of(config: WorldConfig) -> Contract | None:
    """The contract of a world's recipe; None where its robot has no spec, so that nothing can be told before.

    Raises:
        ValueError, OSError, ImportError: there is no such recipe.
    """
    from openpi.cli.serving.serve_dummy import of_recipe
    from openpi.policies.contract import NoSpecError

    try:
        return of_recipe(config.recipe, float(config.control_hz))
    except NoSpecError:
        return None


def _check_fit(place: str, plan: Evaluation) -> None:
    """Raises ValueError where a checkpoint of this machine does not fit the world, OSError where there is none."""
    from openpi.checkpoints.checkpoint import Checkpoint
    from openpi.evaluation import fit
    from openpi.policies.contract import Contract

    if "://" in place or place.startswith("package:"):
        return
    contract = Checkpoint.open(place).read(Contract.find)
    if contract is not None:
        fit.check(contract.as_metadata(), plan.recipe, rate_hz=float(plan.config.control_hz), any_rate=plan.any_rate)


def _run(plan: Evaluation, args: Args, serve_options: tuple[str, ...]) -> int:
    import rich

    from openpi.evaluation import report
    from openpi.evaluation.episodes import RESULTS_FILE, write_json
    from openpi.evaluation.evaluate import compare

    console = rich.get_console()
    if args.compare is None:
        played = [_one(plan, args, args.checkpoint, serve_options, args.output)]
        console.print(report.terminal_table(played[0]))
    else:
        folders = [args.output / name for name in "ab"]
        both = zip(args.compare, folders, strict=True)
        a, b = played = [_one(plan, args, place, serve_options, folder) for place, folder in both]
        found = compare(a, b)
        write_json(args.output / RESULTS_FILE, found)
        page = report.render_comparison(found, a, b, folders)
        (args.output / "report.html").write_text(page, encoding="utf-8")
        console.print(report.comparison_table(found))
        console.print(f"B less A: {report.difference_words(found['total'])}")
    print(f"report: {args.output / 'report.html'}")
    errors = [error for results in played for error in results["errors"]]
    for error in errors:
        print(f"{PROGRAM}: not played: {error}", file=sys.stderr)
    return 1 if errors else 0


def _one(plan: Evaluation, args: Args, checkpoint: str | None, serve_options: tuple[str, ...], output: Path) -> Json:
    """Plays one policy, and writes its page."""
    import rich

    from openpi.evaluation import report
    from openpi.evaluation.evaluate import evaluate
    from openpi.evaluation.pooled_worlds import PooledWorlds, Server
    from openpi.evaluation.progress import bar
    from openpi.shared.pools import open_pool

    console, total = rich.get_console(), len(plan.jobs)
    policy = _described(checkpoint, serve_options) if checkpoint else {"policy": args.policy or "a running server"}
    with (
        open_pool(args.ray, 0) as pool,
        _server(plan, args, policy, output) as asker,
        bar(console, total) as update,
    ):

        def show(done: Done, tally: Tally) -> None:
            update(tally.trials, f"success so far {tally.successes}/{tally.trials}")
            if not console.is_terminal:
                print(f"[{tally.trials}/{total}] {done.error or _outcome(done.result[0])}", flush=True)

        def pooled(seat: Seat) -> PooledWorlds:
            return PooledWorlds(seat, pool, Server(*_address(args)))

        if args.is_remote:  # another checkpoint of the same contract is another evaluation
            policy = {**policy, "serves": asker.metadata.get("checkpoint")}
        places = {"open_worlds": pooled} if args.ray else {}
        results = evaluate(plan, asker, output, policy=policy, resume=args.resume, on_done=show, **places)
    (output / "report.html").write_text(report.render(results, output), encoding="utf-8")
    return results


@contextlib.contextmanager
def _server(plan: Evaluation, args: Args, policy: Json, output: Path) -> Iterator[Asker]:
    from openpi.evaluation.asker import own_server, running_server
    from openpi.shared.children import Command

    host, port, key = _address(args)
    with contextlib.ExitStack() as stack:
        if "checkpoint" in policy:
            command = Command(("serve", policy["checkpoint"], *policy["serve_options"]))
            yield stack.enter_context(own_server(command, output))
            return
        if args.policy is not None:
            port = stack.enter_context(_expert_server(plan.config))
        yield stack.enter_context(running_server(host, port, key))


def _address(args: Args) -> tuple[str, int, str | None]:
    """Host, port and key of a running server."""
    from openpi_client.connection import api_key_of, usual_port

    host, port = args.host or "127.0.0.1", int(args.port_file.read_text()) if args.port_file else args.port
    return host, usual_port(host, port), api_key_of(args.api_key)


@contextlib.contextmanager
def _expert_server(config: WorldConfig) -> Iterator[int]:
    """The world's expert on a port of this process, as any policy is served."""
    import queue

    from openpi.evaluation.expert_policy import ExpertPolicy
    from openpi.serving.server import PolicyServer

    expert = config.expert()
    assert expert is not None
    policy, ports = ExpertPolicy(expert, _contract_of(config)), queue.SimpleQueue[int]()
    server = PolicyServer(lambda: policy, host="127.0.0.1", port=0, on_listening=ports.put)
    thread = threading.Thread(target=server.run, name="expert", daemon=True)
    thread.start()
    try:
        yield ports.get(timeout=_PATIENCE_S)
    finally:
        server.stop()
        thread.join(_PATIENCE_S)
        server.finish_thread(_PATIENCE_S)


def _described(checkpoint: str, serve_options: Sequence[str]) -> dict[str, object]:
    """What is evaluated: the step's folder, so that a run that goes on is not mixed in, and what is in it."""
    from openpi.checkpoints.checkpoint import Checkpoint

    if "://" in checkpoint or checkpoint.startswith("package:"):
        return {"checkpoint": checkpoint, "serve_options": list(serve_options)}
    opened = Checkpoint.open(checkpoint)
    known = {name: value for name, value in opened.identity.items() if name == "checksums"}
    return {"checkpoint": str(opened.folder.resolve()), **known, "serve_options": list(serve_options)}


def _outcome(episode: Episode) -> str:
    told = "" if episode.prompt == episode.task else f" (told: {episode.prompt})"
    outcome = "success" if episode.success else f"failure ({episode.end})"
    return f"{outcome} after {episode.num_steps} steps: {episode.task}, seed {episode.seed}{told}"


def _kept(output: Path | None) -> str:
    """How to go on, if there is something to go on with."""
    folders = [] if output is None else [output, output / "a", output / "b"]
    counts = [len(file.read_bytes().splitlines()) for f in folders if (file := f / "episodes.jsonl").is_file()]
    return f". {sum(counts)} episodes are kept in {output}; go on with --resume" if sum(counts) else ""
