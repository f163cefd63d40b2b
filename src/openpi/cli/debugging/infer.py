"""`openpi infer RECIPE_OR_CHECKPOINT --observation obs.npz --output actions.npz`: one chunk of actions, offline.

The same numbers as a server would send for the same noise. Exit codes: 0 = written; 1 = refused or failed; 2 = bad
command line.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openpi.cli.console import check_range, command, configure_logging, make_parser
from openpi.shared import frameworks

if TYPE_CHECKING:
    from openpi.checkpoints.checkpoint import Checkpoint
    from openpi.models.model import BaseModel
    from openpi.policies.policy import Policy
    from openpi.training.config import TrainConfig

logger = logging.getLogger(__name__)


@command("openpi infer", NotImplementedError)
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    configure_logging()
    logger.info("written: %s", infer(args))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi infer", __doc__)
    parser.add_argument(
        "source",
        metavar="RECIPE_OR_CHECKPOINT",
        help="step directory, run directory or URL of a checkpoint; or a recipe, which then runs on the weights "
        "that its training would start from",
    )
    parser.add_argument("--config", metavar="RECIPE", help="recipe of a checkpoint that carries none")
    parser.add_argument("--observation", metavar="FILE.npz", required=True, help="one array per '/'-joined client key")
    parser.add_argument("--output", metavar="FILE.npz", required=True, type=Path)
    parser.add_argument("--noise", metavar="FILE", help="float[horizon, dim] to start from, .npy or .npz (key noise)")
    parser.add_argument("--seed", type=int, default=0, help="draws the noise when no file is given (default 0)")
    parser.add_argument("--num-steps", type=int, metavar="N", help="denoising steps; default: the model's (10)")
    parser.add_argument("--default-prompt", metavar="TEXT", help="for an observation without a prompt")
    parser.add_argument(
        "--backend",
        choices=("jax", "pytorch"),
        help="default: PyTorch for model.safetensors, else JAX; or what is installed",
    )
    parser.add_argument("--pytorch-device", metavar="DEVICE", help="such as cuda:1 or cpu; implies --backend pytorch")
    return parser


def infer(args: argparse.Namespace) -> Path:
    """Runs the policy once and writes what it returns, with the noise that was used.

    Raises:
        ValueError, KeyError, FileNotFoundError: the source, the observation, the noise or a number does not fit.
    """
    from openpi.cli.debugging._observation_file import load_array, load_observation, save_arrays
    from openpi.models.model_config import ModelType
    from openpi.training import recipe_io

    check_range("num_steps", args.num_steps, 1)
    observation = load_observation(args.observation)
    config, checkpoint = recipe_io.resolve(args.source, args.config)
    model = config.model
    if args.noise:
        noise = load_array(args.noise, key="noise").astype(np.float32)
    elif model.model_type is ModelType.PI0_FAST:  # writes its actions token by token
        noise = None
    else:
        noise = draw_noise(args.seed, (model.action_horizon, model.action_dim))
    sample_kwargs = {} if args.num_steps is None else {"num_steps": args.num_steps}
    chosen = {"backend": args.backend, "pytorch_device": args.pytorch_device}
    if checkpoint is None and set(chosen.values()) - {None, "jax"}:
        raise ValueError("a recipe without a checkpoint runs with JAX; name a checkpoint, or leave --backend out")
    if checkpoint is None:
        frameworks.require("jax", "a recipe without a checkpoint")
    logger.info("loading %s", checkpoint or f"what the training of '{config.name}' would start from")
    policy = load_policy(config, checkpoint, sample_kwargs, args.default_prompt, **chosen)
    logger.info("the weights are loaded; a chunk is being computed, for which JAX compiles first")
    result = policy.infer(observation, noise=noise)
    actions = np.asarray(result["actions"], dtype=np.float32)
    used = {} if noise is None else {"noise": noise}
    return save_arrays(args.output, {**result, "actions": actions, **used})


def draw_noise(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """float32 Gaussian noise that depends on the seed only, not on the machine."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def load_policy(
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    sample_kwargs: Mapping[str, object],
    default_prompt: str | None,
    **chosen: Any,
) -> Policy:
    """The policy of a checkpoint; or of a recipe alone, with the weights that its training would start from."""
    frameworks.use_compilation_cache()
    from openpi.policies import policy_config

    if checkpoint is not None:
        return policy_config.create_trained_policy(
            config, checkpoint, sample_kwargs=sample_kwargs, default_prompt=default_prompt, **chosen
        )
    from openpi.policies.policy import Policy
    from openpi.policies.sampler_jax import JaxSampler

    data_config = config.data.create(config.assets_dirs, config.model)
    around = policy_config.make_pipeline(data_config, default_prompt=default_prompt)
    if data_config.norm_stats is None:
        logger.warning("the recipe has no normalisation statistics: state and actions stay in the model's units")
    return Policy(
        JaxSampler(_starting_model(config)),
        transforms=around.inputs,
        output_transforms=around.outputs,
        sample_kwargs=sample_kwargs,
    )


def _starting_model(config: TrainConfig) -> BaseModel:
    """What training starts from: the recipe's weights, and random values where they have none."""
    from openpi.shared.tree import flatten, unflatten
    from openpi.training import weight_loaders
    from openpi.weights import on_device

    reference = config.model.abstract_params()
    wanted = flatten(reference)
    weights = weight_loaders.open_weights(config.start_weights, reference)
    loaded = flatten(on_device.read_params(weights, dtype="float32"))
    fresh = sorted(wanted.keys() - loaded.keys())
    logger.warning(
        "'%s' is a recipe, not a checkpoint: %d of %d parameters come from %s, %s",
        config.name,
        len(loaded),
        len(wanted),
        config.weight_loader,
        "the others are RANDOM and the actions mean nothing" if fresh else "none is random",
    )
    if fresh:
        loaded = {**loaded, **_initial(config, fresh)}
    return config.model.load(unflatten(loaded))


def _initial(config: TrainConfig, paths: Sequence[str]) -> dict[str, object]:
    """Random values of some parameters; under `jit`, so that the others are never made."""
    import jax

    from openpi.shared.tree import flatten

    def some(key: jax.Array) -> dict[str, jax.Array]:
        params = flatten(config.model.create(key).params)
        return {path: params[path] for path in paths}

    return jax.jit(some)(jax.random.key(config.seed))
