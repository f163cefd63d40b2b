"""`openpi explain RECIPE_OR_CHECKPOINT [--FIELD=VALUE ...]`: one sample through every stage of the pipeline, and back.

    openpi explain my_robot.py:config --index 120
    openpi explain checkpoints/my_robot/first --observation obs.npz --images out/

Uses the very transforms of training (with a dataset) or of serving (with an observation). Exit codes: 0 = shown,
whatever was found; 1 = a stage failed; 2 = bad command line.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from openpi.cli.console import OWN_FIELDS, command, configure_logging, make_parser

if TYPE_CHECKING:
    from openpi.cli.debugging._explain_view import StageReport
    from openpi.data.dataset import Sample
    from openpi.models.model_config import BaseModelConfig
    from openpi.training.data.sample_checks import Context, Finding
    from openpi.training.data.sample_trace import Stage, Step

logger = logging.getLogger(__name__)


class View(Protocol):
    def stage(self, report: StageReport) -> None: ...

    def close(self, error: str | None) -> None: ...


@command("openpi explain")
def main(argv: list[str] | None = None) -> int:
    args, overrides = _parser().parse_known_args(argv)
    configure_logging(logging.ERROR)  # what the stages would warn of is among the findings
    return explain(args, overrides)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi explain", __doc__, epilog=OWN_FIELDS)
    parser.add_argument(
        "source",
        metavar="RECIPE_OR_CHECKPOINT",
        help="recipe name, path.py:attribute, module:attribute, step directory or run directory",
    )
    parser.add_argument("--config", metavar="RECIPE", help="recipe of a checkpoint that carries none")
    sample = parser.add_mutually_exclusive_group()
    sample.add_argument("--dataset", metavar="PATH|ID", help="LeRobot dataset instead of the recipe's")
    sample.add_argument("--observation", metavar="FILE.npz", help="what a robot sends: the path of serving")
    parser.add_argument("--index", type=int, default=0, help="frame of the dataset (default 0)")
    parser.add_argument("--actions", metavar="FILE", help="model output [horizon, dim] for the way back, .npy or .npz")
    parser.add_argument(
        "--images", metavar="FOLDER", type=Path, help="write the images of every stage that makes some there, as PNG"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    return parser


def explain(args: argparse.Namespace, flags: Sequence[str] = ()) -> int:
    """Walks the sample through the chains and reports every stage as it comes."""
    from openpi.cli.debugging import _explain_chain as chain
    from openpi.cli.debugging._explain_view import JsonView, TextView
    from openpi.cli.debugging._observation_file import load_observation
    from openpi.training import recipe_io
    from openpi.training.data import recipe_data
    from openpi.training.data.sample_checks import Context
    from openpi.training.recipe import overrides

    config, checkpoint = recipe_io.resolve(args.source, args.config)
    config = overrides.parse(config, flags, prog="openpi explain") if flags else config
    config = recipe_data.with_dataset(config, args.dataset)
    around = chain.pipeline(config, checkpoint)
    about = {"recipe": config.name, "checkpoint": str(checkpoint or "none"), "model": _model_line(config.model)}
    if args.observation:
        recorded = chain.Recording(
            load_observation(args.observation), args.observation, chain.steps_of(around.inputs, around.data_config)
        )
    else:
        recorded = chain.recording(config, around.data_config, args.index)
    about["sample"] = recorded.about
    context = Context(
        config.model,
        chain.dimension_names(around.data_config, around.contract, recorded.names),
        recorded.episode_length,
        recorded.unread_cameras,
        around.contract,
    )
    view = JsonView(sys.stdout, about) if args.json else TextView(sys.stdout, about)
    walk = Walk(view, context, args.images)
    try:
        title = "observation" if args.observation else "dataset item"
        inputs = walk.inputs(title, recorded.sample, recorded.steps, is_training=not args.observation)
        walk.outputs(inputs, chain.steps_of(around.outputs, around.data_config), args.actions)
    except Exception as error:  # a user's own transform may raise anything
        logger.debug("", exc_info=True)
        view.close(_message(error))
        return 1
    view.close(None)
    return 0


class Walk:
    """Reports the stages of one sample, on the way to the model and on the way back."""

    def __init__(self, view: View, context: Context, image_folder: Path | None) -> None:
        self._view = view
        self._context = context
        self._image_folder = image_folder
        self._num_stages = 0
        self._client_actions: Any = None

    def inputs(self, title: str, first: Sample, steps: Sequence[Step], *, is_training: bool) -> Sample:
        """To the model; returns its un-batched inputs."""
        from openpi.training.data import sample_checks as checks
        from openpi.training.data import sample_trace as trace

        before, sample = None, first
        for stage in trace.run(trace.Stage(title, first), steps):
            self._report("input", stage, before, checks.check_stage(stage, before, self._context))
            if stage.step is None or stage.step.part in ("dataset", "repack"):
                self._client_actions = stage.sample.get("actions")
            before = sample = stage.sample
        whole = checks.check_inputs(sample, self._context, is_training=is_training)
        self._report("input", trace.Stage("Observation: what the model gets", _model_inputs(sample)), None, whole)
        return sample

    def outputs(self, inputs: Sample, steps: Sequence[Step], actions_file: str | None) -> None:
        """Back to the robot: a given chunk, or the recorded actions; nothing when there are neither."""
        from openpi.training.data import sample_checks as checks
        from openpi.training.data import sample_trace as trace

        first = _model_outputs(inputs, actions_file, self._context.model)
        if first is None:
            return
        before, stage = None, None
        for stage in trace.run(trace.Stage("model output", first), steps):
            findings = [] if before is None else checks.check_stage(stage, before, self._context, is_output=True)
            self._report("output", stage, before, findings)
            before = stage.sample
        if actions_file is None and self._client_actions is not None and before is not None:
            finding = checks.check_round_trip(self._client_actions, before["actions"])
            self._report("output", trace.Stage("round trip", {}), None, [finding])

    def _report(self, direction: str, stage: Stage, before: Sample | None, findings: Sequence[Finding]) -> None:
        from openpi.cli.debugging._explain_view import StageReport
        from openpi.training.data import sample_trace as trace

        leaves, removed = trace.leaves(stage.sample, before), trace.removed(stage.sample, before)
        self._view.stage(StageReport(direction, stage.title, leaves, removed, findings))
        if self._image_folder is not None and stage.step is not None:
            new = {leaf.key for leaf in leaves if leaf.is_new}
            _write_images(self._image_folder / f"{self._num_stages:02d}_{stage.step.name}", stage.sample, new)
        self._num_stages += 1


def _model_inputs(sample: Sample) -> Sample:
    """The batch of one that the model is given, as `Observation` holds it, and the actions."""
    from openpi.data.batch_loader import stack
    from openpi.models.observation import Observation

    batch = stack([sample])
    actions = {"actions": batch["actions"]} if "actions" in batch else {}
    return Observation.from_dict(batch).to_dict() | actions


def _model_outputs(inputs: Sample, actions_file: str | None, model: BaseModelConfig) -> Sample | None:
    """What the model would return: a given chunk, or one that repeats the recording."""
    from openpi.cli.debugging._observation_file import load_array

    if actions_file is not None:
        actions, expected = load_array(actions_file, key="actions"), (model.action_horizon, model.action_dim)
        if actions.shape != expected:
            raise ValueError(
                f"{actions_file} has shape {actions.shape}; expected {expected}, what the model returns before it is "
                "unnormalised and cut to the robot's dimensions"
            )
        return {"state": inputs["state"], "actions": actions}
    if "token_loss_mask" in inputs and inputs["token_loss_mask"].any():  # pi0-FAST returns tokens
        return {"state": inputs["state"], "actions": inputs["tokenized_prompt"][inputs["token_loss_mask"]]}
    if "actions" in inputs:
        return {"state": inputs["state"], "actions": inputs["actions"]}
    return None


def _write_images(folder: Path, sample: Sample, keys: Collection[str]) -> None:
    """Those of the keys that are uint8 images [h, w, 3], as `<key>.png`."""
    import numpy as np
    from PIL import Image

    from openpi.shared.tree import flatten

    for key, value in flatten(sample).items():
        array = np.asarray(value)
        if key in keys and array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / f"{key.replace('/', '.')}.png")


def _model_line(model: BaseModelConfig) -> str:
    return (
        f"{model.model_type.value}, {model.action_horizon} actions of {model.action_dim}, {model.max_token_len} tokens"
    )


def _message(error: BaseException) -> str:
    """One line; a `KeyError` of user code says at least that it is one, ours has a sentence."""
    from openpi.shared.errors import MissingKeyError

    return str(error) if isinstance(error, MissingKeyError) else f"{type(error).__name__}: {error}"
