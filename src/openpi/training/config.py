"""`TrainConfig`: the complete, named description of a run, and how one is found by name.

Recipes live in `openpi.training.recipes`, one robot family a file, or anywhere: wherever a name is accepted,
`path/to/my_robot.py:recipe` and `package.module:recipe` are too. Source: the training specification, section 6.
No JAX here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from openpi.models.model_config import BaseModelConfig, ModelType
from openpi.models.pi0_config import Pi0Config
from openpi.shared import plugins, ranges, references
from openpi.shared.ranges import Count, Decay, Range
from openpi.training import freeze, weight_loaders
from openpi.training import optimizer as _optimizer
from openpi.training.data_config import (
    HIDDEN,
    AssetsConfig,
    DataConfig,
    DataConfigFactory,
    FakeDataConfig,
    GroupFactory,
    LeRobotAlohaDataConfig,
    LeRobotDROIDDataConfig,
    LeRobotLiberoDataConfig,
    ModelTransformFactory,
    RLDSDroidDataConfig,
    SimpleDataConfig,
)
from openpi.training.mixture_config import MixtureDataConfig, MixturePart
from openpi.training.recipe import nnx_filters

__all__ = [
    "AssetsConfig",
    "DataConfig",
    "DataConfigFactory",
    "FakeDataConfig",
    "GroupFactory",
    "LeRobotAlohaDataConfig",
    "LeRobotDROIDDataConfig",
    "LeRobotLiberoDataConfig",
    "MixtureDataConfig",
    "MixturePart",
    "ModelTransformFactory",
    "ModelType",
    "RLDSDroidDataConfig",
    "SimpleDataConfig",
    "TrainConfig",
    "cli",
    "config_names",
    "get_config",
]


Interval = Annotated[int, Range(0, note="0 = only at the end of the run")]
"""Steps between two of a kind."""
HoldOut = Annotated[
    float, Range(0, below=math.inf, is_whole_from=1, note="so many episodes, or below 1 that share of them")
]
"""Episodes kept out of training."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A recipe. Every field is a flag of `openpi train`, nested ones with dots.

    Raises ValueError when it is made with a number, its own or of a part, that is out of its range.

    Attributes:
        name: of the recipe; folder below `assets_base_dir` and `checkpoint_base_dir`.
        note: what it is for, which data it needs, why its numbers are what they are; `openpi configs NAME` shows it.
        project_name: where trackers file the run.
        exp_name: of this run; folder below the recipe's.
        weight_loader: what training starts from.
        pytorch_weight_path: folder of a PyTorch checkpoint to start from, for the PyTorch trainer.
        pytorch_training_precision: of the PyTorch trainer: it computes in `bfloat16` with f32 weights, or all in
            `float32`; `pure_bfloat16` also keeps the weights in bfloat16, which saves memory and learns worse, but for
            AdamW with `state_bits=8`, which rounds them at random.
        pytorch_free_gradients: whether the PyTorch trainer updates each weight during the backward pass and frees its
            gradient, which saves a copy of the weights; on one device, without clipping.
        pytorch_frozen_bits: of a frozen weight, in the PyTorch trainer: 8 are integers with a step for each row, which
            halves what the base of adapters takes; checkpoints hold the rounded weights that were trained with.
        pytorch_compile: whether the PyTorch trainer compiles the transformer blocks (`torch.compile`).
        ema_decay: per step, of the averaged weights that are saved for inference; None = no averaging.
        freeze_filter: predicate on parameter paths; frozen ones get no gradient and no optimiser state, and are
            kept in bfloat16. Filters of `flax.nnx` become those of `openpi.training.freeze`.
        seed: of initialisation, noise and data order.
        batch_size: samples per optimiser step, over all devices and accumulation steps.
        gradient_accumulation_steps: the batch is run in so many parts, to save memory; the mean gradient of the parts,
            each with its own noise.
        num_workers: processes that decode and transform samples; 0 = threads of this one.
        frames_per_pass: of a video whose frames seldom decode alone, how many of a stretch are read in one pass; they
            are spread over as many batches. 1 = each frame on its own, in any order.
        log_interval: steps between log lines; also the only points where the host waits for the device.
        save_interval: steps between checkpoints; 0 = only at the end of the run.
        save_frozen_params: whether checkpoints hold the frozen weights too, as published ones do. Without them, a
            checkpoint of adapters takes MBs, and reads the rest from where `weight_loader` found it.
        keep_period: checkpoints at multiples of it stay; None = none but the latest.
        keep_best: also keep the checkpoint with the lowest validation loss.
        holdout_episodes: episodes kept out of training for validation: a number, or a fraction below 1; 0 = none.
            None = 5 % of them, at least one and at most 20; none of a dataset of one or two, or of a stream. The best
            checkpoint is kept then, too.
        eval_interval: steps between validations; 0 = only at the end of the run, None = `save_interval`.
        eval_batches: batches per validation.
        overwrite: delete an existing run of the same name.
        resume: continue an existing run of the same name.
        wandb_enabled, tensorboard_enabled: observers; the console and `metrics.jsonl` are always on.
        policy_metadata: sent to robots when a checkpoint of this recipe is served.
        backend: framework that trains; recipes, data and the small files of checkpoints are the same.
        fsdp_devices: devices that share one copy of the parameters.
        cpu_devices: on a machine without accelerator, parts that the processor is split into; each takes its share of
            every batch, with a copy of the parameters. For small models: one part leaves most cores idle.
    """

    name: str = dataclasses.field(metadata=HIDDEN)
    note: str = dataclasses.field(default="", metadata=HIDDEN, kw_only=True)
    project_name: str = "openpi"
    exp_name: str = ""

    model: BaseModelConfig = dataclasses.field(default_factory=lambda: Pi0Config())
    weight_loader: weight_loaders.WeightLoader = dataclasses.field(default_factory=weight_loaders.NoOpWeightLoader)
    pytorch_weight_path: str | None = None
    pytorch_training_precision: Literal["bfloat16", "float32", "pure_bfloat16"] = "bfloat16"
    pytorch_compile: bool = dataclasses.field(default=False, kw_only=True)
    pytorch_free_gradients: bool = dataclasses.field(default=False, kw_only=True)
    pytorch_frozen_bits: Literal[16, 8] = dataclasses.field(default=16, kw_only=True)

    lr_schedule: _optimizer.LRScheduleConfig = dataclasses.field(default_factory=_optimizer.CosineDecaySchedule)
    optimizer: _optimizer.OptimizerConfig = dataclasses.field(default_factory=_optimizer.AdamW)
    ema_decay: Decay | None = 0.99
    freeze_filter: freeze.Filter = dataclasses.field(default=freeze.freeze_nothing, metadata=HIDDEN)

    data: DataConfigFactory = dataclasses.field(default_factory=FakeDataConfig)
    assets_base_dir: str = "./assets"
    checkpoint_base_dir: str = "./checkpoints"

    seed: Annotated[int, Range(0, 2**32 - 1)] = 42
    batch_size: Count = 32
    gradient_accumulation_steps: Count = 1
    num_workers: Annotated[int, Range(0, note="0 = threads of this process")] = 2
    frames_per_pass: Count = 1
    num_train_steps: Count = 30_000

    log_interval: Count = 100
    save_interval: Interval = 1000
    save_frozen_params: bool = True
    keep_period: Count | None = 5000
    keep_best: bool = False

    holdout_episodes: HoldOut | None = None
    eval_interval: Interval | None = None
    eval_batches: Count = 8

    overwrite: bool = False
    resume: bool = False
    wandb_enabled: bool = False
    tensorboard_enabled: bool = False
    policy_metadata: Mapping[str, Any] | None = dataclasses.field(default=None, metadata=HIDDEN)
    backend: Literal["jax", "pytorch"] = "jax"
    fsdp_devices: Count = 1
    cpu_devices: Count = 1

    def __post_init__(self) -> None:
        ranges.check(self, has_flags=True)
        object.__setattr__(self, "freeze_filter", nnx_filters.as_filter(self.freeze_filter))
        if self.resume and self.overwrite:
            raise ValueError(
                "resume and overwrite are both set; continue the run with one, or delete it with the other"
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )

    @property
    def assets_dirs(self) -> Path:
        """The recipe's own assets folder, absolute."""
        return (Path(self.assets_base_dir).expanduser() / self.name).resolve()

    @property
    def checkpoint_dir(self) -> Path:
        """The run's folder, absolute.

        Raises:
            ValueError: no experiment name, or one that leads out of `checkpoint_base_dir`, where `overwrite` would
                delete what is no run.
        """
        if not self.exp_name:
            raise ValueError("exp_name is empty; name this run with --exp-name=NAME")
        for field, name in (("name", self.name), ("exp_name", self.exp_name)):
            parts = name.replace("\\", "/").split("/")
            if not name.isprintable() or any(part in ("", ".", "..") for part in parts):
                raise ValueError(
                    f"{field} is {name[:80]!r}; expected a name for a folder below checkpoint_base_dir "
                    f"({self.checkpoint_base_dir}), without '..'"
                )
        return (Path(self.checkpoint_base_dir).expanduser() / self.name / self.exp_name).resolve()

    @property
    def start_weights(self) -> weight_loaders.WeightLoader:
        """What training starts from: `pytorch_weight_path`, if given; in JAX, only if there is nothing else."""
        path = self.pytorch_weight_path
        if path is None or path.startswith("/path/to/your"):  # as a published recipe has it
            return self.weight_loader
        if self.backend == "pytorch" or isinstance(self.weight_loader, weight_loaders.NoOpWeightLoader):
            return weight_loaders.CheckpointWeightLoader(path)
        return self.weight_loader

    @property
    def trainable_filter(self) -> freeze.Filter:
        """Predicate on parameter paths: true where gradients are taken."""
        return freeze.Not(self.freeze_filter)


def get_config(name: str) -> TrainConfig:
    """A recipe by registered name, `path/to/file.py:attribute` or `package.module:attribute`.

    Raises:
        ValueError: unknown name (the closest is suggested), or the attribute is no recipe.
        FileNotFoundError, ModuleNotFoundError: no such file or module.
    """
    if references.is_reference(name):
        return _config_of_attribute(name)
    recipes = _registered()
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, n=3, cutoff=0.0)
        raise ValueError(
            f"config '{name}' not found; did you mean {' or '.join(map(repr, close))}? `openpi configs` lists all "
            f"{len(recipes)}; a recipe of your own is named path/to/file.py:attribute or package.module:attribute"
            f"{plugins.hint('openpi.recipes', name)}"
        )
    return recipes[name]


def config_names() -> list[str]:
    """The registered recipes."""
    return list(_registered())


def cli(argv: Sequence[str] | None = None, *, prog: str | None = None) -> TrainConfig:
    """Parses `NAME [--field=value ...]`; `argv` defaults to the process's arguments.

    Only the flags of the named recipe are built. Exits with a message and code 2 on a bad command line, and with
    the list of recipes on `--help` before a name.
    """
    from openpi.training.recipe import overrides

    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(prog or Path(sys.argv[0]).name))
        raise SystemExit(0 if argv else 2)
    try:
        config = get_config(argv[0])
        return overrides.parse(config, argv[1:], prog=f"{prog or Path(sys.argv[0]).name} {argv[0]}")
    except (ValueError, ImportError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def _usage(prog: str) -> str:
    names = "\n".join(f"  {name}" for name in config_names())
    return (
        f"usage: {prog} CONFIG --exp-name=NAME [--overwrite | --resume] [--FIELD=VALUE ...]\n\n"
        f"Trains a recipe, or goes on with a run: `{prog} my_robot.py:config --exp-name=first [--resume]`\n\n"
        f"CONFIG is one of\n{names}\nor path/to/file.py:attribute, or package.module:attribute.\n\n"
        f"`{prog} CONFIG --help` lists the fields of one, with its values."
    )


def __getattr__(name: str) -> object:
    """`_CONFIGS` and `_CONFIGS_DICT`: what scripts written for the published system look recipes up in."""
    if name == "_CONFIGS_DICT":
        return dict(_registered())
    if name == "_CONFIGS":
        return list(_registered().values())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _registered() -> Mapping[str, TrainConfig]:
    """Imported on first use: recipes import this module."""
    from openpi.training import recipes

    return recipes.all_recipes()


def _config_of_attribute(reference: str) -> TrainConfig:
    """Of a file's attributes; or, by its name, of the file's list `_CONFIGS`, as the published one has it."""
    where, module, attribute = references.resolve(reference, "recipe")
    listed = {config.name: config for config in getattr(module, "_CONFIGS", ()) if hasattr(config, "name")}
    if not attribute or (attribute not in listed and not hasattr(module, attribute)):
        known = [name for name, value in vars(module).items() if isinstance(value, TrainConfig)]
        recipes = [f"{where}:{name}" for name in dict.fromkeys((*known, *listed))]
        what = f"has no '{attribute}'" if attribute else "is a file of recipes"
        raise ValueError(f"{where} {what}; name one of its recipes: {', '.join(recipes) or 'there is none'}")
    config = getattr(module, attribute) if hasattr(module, attribute) else listed[attribute]
    if callable(config) and not isinstance(config, type):
        config = config()
    from openpi.training.recipe import adopted

    try:
        return adopted.as_recipe(config)
    except ValueError as error:
        raise ValueError(f"'{reference}' cannot be used: {error}") from None
