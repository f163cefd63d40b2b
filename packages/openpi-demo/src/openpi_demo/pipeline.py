"""The demo from start to end: record, statistics, before, fine-tune, after, listen, compare, report.

this process                 child processes, each a public command
run_demo --- record -------> openpi demo record
         --- stats --------> openpi stats
         --- before -------> openpi serve <base>        <== websocket ==> openpi evaluate tabletop
         --- train --------> openpi train
         --- after --------> openpi serve <checkpoint>  <== websocket ==> openpi evaluate tabletop
         --- prompt swap --> (the same server)          <== websocket ==> openpi evaluate tabletop --swap-prompts
         --- from scratch -> train, serve and evaluate once more, without the base, if time allows
         --- report -------> report.json, report.html
"""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from openpi.evaluation.episodes import RESULTS_FILE
from openpi.evaluation.stats import Tally
from openpi.shared import frameworks
from openpi.shared.children import Child, Children
from openpi.shared.strict_json import Json
from openpi.training.config import get_config
from openpi.training.run import run_report
from openpi_demo import machine, report
from openpi_demo.plan import FULL, QUICK, SCRATCH_RECIPE, Backend, Plan
from openpi_demo.stages import StageRunner
from openpi_demo.terminal import Terminal

MARKER_FILE = ".openpi-demo"
NUM_STAGES = 8
NEEDED_BYTES = 500 * 2**20


@dataclass(frozen=True)
class DemoOptions:
    """Fine-tunes the small base model that comes with openpi on a task it has never seen, and shows what came of it:
    records demonstrations, trains, serves, evaluates in closed loop before and after, and leaves a report.

    Attributes:
        output: folder for everything.
        overwrite: replace the output of an earlier demo.
        quick: the same path in about a minute, to see that everything works; it learns nothing.
        backend: framework that trains and serves.
        demonstrations: recorded episodes (default: 400).
        episodes: closed-loop episodes before, and after (default: 50).
        train_steps: optimiser steps (default: the recipe's).
        from_scratch: also train without the base, for comparison; auto: if it fits into `time_budget_s`.
        time_budget_s: seconds for everything, as far as leaving out that comparison can help.
    """

    output: Path = Path("openpi_demo")
    overwrite: bool = False
    quick: bool = False
    backend: Backend = "jax"
    demonstrations: int | None = None
    episodes: int | None = None
    train_steps: int | None = None
    from_scratch: Literal["auto", "yes", "no"] = "auto"
    time_budget_s: float = 300.0

    def plan(self) -> Plan:
        """The commands to run; ValueError for sizes that make no sense."""
        asked = {name: getattr(self, name) for name in ("demonstrations", "episodes", "train_steps")}
        given = {name: value for name, value in asked.items() if value is not None}
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")
        return Plan(self.output, replace(QUICK if self.quick else FULL, **given), backend=self.backend)


def run_demo(options: DemoOptions) -> Path:
    """Runs everything and returns the path of the report.

    Raises:
        FileExistsError: the output folder is in use.
        OSError: too little disk space.
        ImportError: the backend is not installed.
        CommandFailedError: a command failed. Nothing keeps running.
    """
    plan = options.plan()
    frameworks.require_backend(options.backend)
    terminal = Terminal(NUM_STAGES)
    open_output(options)
    with Children() as children:
        return _Demo(options, plan, StageRunner(plan, children, terminal), terminal).run()


def open_output(options: DemoOptions) -> None:
    """Creates the folder; deletes an old one only if a demo made it.

    Raises:
        FileExistsError: there is something else in it, or an earlier demo and `overwrite` is not set.
        OSError: too little disk space.
    """
    output = options.output
    _check_disk_space(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        is_ours = (output / MARKER_FILE).is_file()
        if not (is_ours and options.overwrite):
            fix = "replace that demo with --overwrite, or choose" if is_ours else "no demo made it; choose"
            raise FileExistsError(f"output folder {output} is not empty: {fix} another --output.")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER_FILE).touch()


def _check_disk_space(output: Path) -> None:
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < NEEDED_BYTES:
        raise OSError(
            f"{free / 2**20:.0f} MiB are free for {output}; the demo needs up to {NEEDED_BYTES / 2**20:.0f}. "
            "Make room, or choose another --output."
        )


class _Demo:
    """The sequence, and what it found."""

    def __init__(self, options: DemoOptions, plan: Plan, runner: StageRunner, terminal: Terminal):
        self._options = options
        self._plan = plan
        self._runner = runner
        self._terminal = terminal
        self._framework = report.FRAMEWORKS[options.backend]
        self._started = time.perf_counter()
        self._evaluations: dict[str, dict[str, Any]] = {}
        self._metrics: dict[str, list[run_report.Row]] = {}

    def run(self) -> Path:
        """All stages, in order; returns the path of the report."""
        plan, runner, sizes = self._plan, self._runner, self._plan.sizes
        with runner.stage("record", "Record demonstrations of a new task: put a block on a plate"):
            runner.run(plan.record(), log="record", total=sizes.demonstrations)
        with runner.stage("stats", "Compare normalisation statistics with those of the base, which training keeps"):
            runner.run(plan.stats(plan.recipe), log="stats")
        with runner.stage("evaluate_before", "Serve the base and try the new task with it"):
            server = runner.serve(plan.serve("base", plan.base), name="base")
            self._evaluate("before", server, "base")
            server.stop()
        with runner.stage("train", f"Fine-tune the base on the demonstrations, with {self._framework}"):
            run_dir = self._train("finetuned", plan.recipe)
        with runner.stage("evaluate_after", "Serve the checkpoint and evaluate it in scenes it has not seen"):
            server = runner.serve(plan.serve("finetuned", run_dir), name="finetuned")
            self._evaluate("after", server, "finetuned")
        with runner.stage("prompt_swap", "Tell it something else than what it is judged by: does it listen?"):
            self._evaluate("swapped", server, "finetuned", episodes=sizes.swapped_episodes)
            server.stop()
        with runner.stage("from_scratch", "Spend the same training without the base"):
            self._compare_with_scratch()
        with runner.stage("report", "Write the report"):
            path = self._write_report()
        self._terminal.say(f"report: {path}", "bold green")
        return path

    def _evaluate(self, name: str, server: Child, server_name: str, *, episodes: int | None = None) -> None:
        sizes = self._plan.sizes
        episodes = episodes or sizes.episodes
        films = sizes.films if name == "after" else sizes.films_of_failure
        command = self._plan.evaluate(
            name, server=server_name, episodes=episodes, films=films, swap_prompts=name == "swapped"
        )
        self._runner.run(command, log=f"evaluate_{name}", total=episodes, server=server)
        results = json.loads((self._plan.evaluation(name) / RESULTS_FILE).read_text())
        result = self._evaluations[name] = as_evaluation(results, self._plan.evaluation(name).name)
        self._terminal.say(f"success: {_tally(result['total'])}", "bold")
        if name == "swapped":
            self._terminal.say(f"did what it was told instead: {_tally(result['told'])}", "bold")

    def _train(self, name: str, recipe: str) -> Path:
        """Trains, keeps the metrics, and returns the run's folder."""
        config = get_config(recipe)
        num_steps = self._plan.sizes.train_steps or config.num_train_steps
        self._runner.run(self._plan.train(recipe), log=f"train_{name}", total=num_steps)
        run_dir = self._plan.run_dir(config.name)
        self._metrics[name] = run_report.read_metrics(run_dir)
        return run_dir

    def _compare_with_scratch(self) -> None:
        """Trains and evaluates once more from random weights, if asked for, or if it fits the time."""
        seconds = {stage.name: stage.seconds for stage in self._runner.stages}
        expected_s = seconds["train"] + seconds["evaluate_after"]
        elapsed_s = time.perf_counter() - self._started
        fits = elapsed_s + expected_s <= self._options.time_budget_s
        wish = self._options.from_scratch
        if wish == "no" or (wish == "auto" and not fits):
            self._terminal.say(f"left out: it would take about {expected_s:.0f} s more; --from-scratch=yes adds it")
            return
        run_dir = self._train("scratch", SCRATCH_RECIPE)
        server = self._runner.serve(self._plan.serve("scratch", run_dir), name="scratch")
        self._evaluate("scratch", server, "scratch")
        server.stop()

    def _write_report(self) -> Path:
        findings = self._findings()
        output = self._plan.output
        (output / "report.json").write_text(json.dumps(findings, indent=2))
        (output / "report.html").write_text(report.render(findings, output), encoding="utf-8")
        self._terminal.say(
            f"success before {_tally(findings['evaluations']['before']['total'])}, "
            f"after {_tally(findings['evaluations']['after']['total'])}; "
            f"{findings['total_seconds']:.0f} s, at most {findings['peak_memory_mb']:.0f} MB of memory",
            "bold",
        )
        return output / "report.html"

    def _findings(self) -> Json:
        """What `report.json` holds, and the report shows."""
        rates = {name: result["total"]["rate"] for name, result in self._evaluations.items()}
        stages = [stage for stage in self._runner.stages if stage.name != "report"]
        return {
            "success_before": rates["before"],
            "success_after": rates["after"],
            "success_prompt_swapped": rates["swapped"],
            "success_from_scratch": rates.get("scratch"),
            "episodes": self._plan.sizes.episodes,
            "demonstrations": self._plan.sizes.demonstrations,
            "seconds_per_stage": {stage.name: stage.seconds for stage in stages},
            "total_seconds": time.perf_counter() - self._started,
            "peak_memory_mb": max(stage.peak_memory_bytes for stage in stages) / 1e6,
            "peak_memory_mb_per_stage": {stage.name: stage.peak_memory_bytes / 1e6 for stage in stages},
            "quick": self._options.quick,
            "backend": self._options.backend,
            "commands": [str(command) for command in self._runner.commands],
            "evaluations": self._evaluations,
            "training": self._metrics,
            "machine": machine.describe_machine(),
            "versions": machine.versions(self._options.backend),
        }


def as_evaluation(results: Json, folder: str) -> Json:
    """What `report.json` holds of an evaluation: what is judged is a `prompt`, what the policy hears a `told_prompt`.

    Args:
        results: contents of `results.json`, in a folder of this name.
    """

    def judged(entry: Mapping[str, object]) -> Json:
        rest = {name: value for name, value in entry.items() if name != "task"}
        return {**rest, "prompt": entry["task"], "told_prompt": entry["prompt"]}

    trials = results["total"]["trials"]
    same = ("total", "execute_horizon", "seconds", "round_trip_ms")
    return {
        **{name: results[name] for name in same},
        "per_prompt": results["per_task"],
        "episodes": [judged(episode) for episode in results["episodes"]],
        "task": results["world_options"]["task"],
        "told": Tally(round(trials * results["measurements"]["told"]), trials).to_dict(),
        "videos": [{**judged(video), "path": f"{folder}/{video['path']}"} for video in results["videos"]],
    }


def _tally(tally: Json) -> str:
    return str(Tally(tally["successes"], tally["trials"]))
