"""Everything that a recipe's file may name, and under which name: files hold data, and this table gives it meaning.

A name in a file is `<subject>.<name>` and stays what it is wherever the class moves; what is not listed here cannot be
named by a file, so nothing else is ever imported, looked up or called for one. Files of version 1 named import paths
(`module:QualName`), which are kept as aliases.

To add something: list it. To rename or move it: nothing changes here but the import, and `Entry` in place of `_entries`
if its own name changed.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from openpi import transforms
from openpi.codecs import action, observation, timing
from openpi.models import gemma_config, model_config, pi0_config, pi0_fast_config, siglip_config, tokenizer
from openpi.policies import (
    aloha_policy,
    calvin_policy,
    droid_policy,
    libero_policy,
    positronic_policy,
    robot_inputs,
    robot_spec,
    tabletop_policy,
    ur5_policy,
)
from openpi.shared import normalize
from openpi.training import config, data_config, droid_rlds_dataset, freeze, optimizer, weight_loaders
from openpi.training.recipes import calvin, positronic, roboarena, tabletop


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing that files may name.

    Attributes:
        value: a dataclass or an enumeration, whose values files hold; or a function or tokenizer class, which they
            only refer to.
        name: in files of version 2 and later.
        old_name: in files of version 1; None for what came later.
    """

    value: Any
    name: str
    old_name: str | None = None


def _entries(subject: str, old_module: str, *values: Callable[..., Any]) -> Iterator[Entry]:
    for value in values:
        yield Entry(value, f"{subject}.{value.__name__}", f"{old_module}:{value.__name__}")


# Dataclasses and enumerations: a file gives their fields, which are checked against the declared types.
TYPES: tuple[Entry, ...] = (
    *_entries("recipe", "openpi.training.config", config.TrainConfig),
    *_entries("model", "openpi.models.pi0_config", pi0_config.Pi0Config),
    *_entries("model", "openpi.models.pi0_fast_config", pi0_fast_config.Pi0FASTConfig),
    *_entries("model", "openpi.models.gemma_config", gemma_config.GemmaConfig, gemma_config.LoRAConfig),
    *_entries("model", "openpi.models.siglip_config", siglip_config.SiglipConfig),
    *_entries("model", "openpi.models.model_config", model_config.ModelType),
    *_entries("freeze", "openpi.training.freeze", freeze.All, freeze.Any, freeze.Not, freeze.PathRegex),
    *_entries("freeze", "openpi.models.pi0_config", pi0_config.LoRAFreeze),
    *_entries(
        "weights",
        "openpi.training.weight_loaders",
        weight_loaders.NoOpWeightLoader,
        weight_loaders.CheckpointWeightLoader,
        weight_loaders.PaliGemmaWeightLoader,
    ),
    *_entries(
        "optimizer",
        "openpi.training.optimizer",
        optimizer.AdamW,
        optimizer.SGD,
        optimizer.Muon,
        optimizer.CosineDecaySchedule,
        optimizer.RsqrtDecaySchedule,
    ),
    *_entries(
        "data",
        "openpi.training.data_config",
        data_config.AssetsConfig,
        data_config.DataConfig,
        data_config.ModelTransformFactory,
        data_config.FakeDataConfig,
        data_config.SimpleDataConfig,
        data_config.LeRobotAlohaDataConfig,
        data_config.LeRobotDROIDDataConfig,
        data_config.LeRobotLiberoDataConfig,
        data_config.LeRobotUR5DataConfig,
        data_config.RLDSDroidDataConfig,
    ),
    *_entries("data", "openpi.training.recipes.positronic", positronic.LeRobotPositronicDataConfig),
    *_entries(
        "data",
        "openpi.training.droid_rlds_dataset",
        droid_rlds_dataset.RLDSDataset,
        droid_rlds_dataset.DroidActionSpace,
    ),
    *_entries("data", "openpi.shared.normalize", normalize.NormStats),
    *_entries(
        "transform",
        "openpi.transforms",
        transforms.Group,
        transforms.CompositeTransform,
        transforms.RepackTransform,
        transforms.InjectDefaultPrompt,
        transforms.Normalize,
        transforms.Unnormalize,
        transforms.ResizeImages,
        transforms.SubsampleActions,
        transforms.DeltaActions,
        transforms.AbsoluteActions,
        transforms.TokenizePrompt,
        transforms.TokenizeFASTInputs,
        transforms.ExtractFASTActions,
        transforms.PromptFromLeRobotTask,
        transforms.PadStatesAndActions,
    ),
    *_entries(
        "robot", "openpi.policies.robot_spec", robot_spec.CameraSpec, robot_spec.VectorSpec, robot_spec.RobotSpec
    ),
    *_entries("robot", "openpi.policies.robot_inputs", robot_inputs.RobotInputs, robot_inputs.RobotOutputs),
    *_entries("robot", "openpi.policies.aloha_policy", aloha_policy.AlohaInputs, aloha_policy.AlohaOutputs),
    *_entries("robot", "openpi.policies.calvin_policy", calvin_policy.CalvinInputs, calvin_policy.CalvinOutputs),
    *_entries("robot", "openpi.policies.droid_policy", droid_policy.DroidInputs, droid_policy.DroidOutputs),
    *_entries("robot", "openpi.policies.libero_policy", libero_policy.LiberoInputs, libero_policy.LiberoOutputs),
    *_entries(
        "robot",
        "openpi.policies.positronic_policy",
        positronic_policy.PositronicInputs,
        positronic_policy.PositronicOutputs,
    ),
    *_entries(
        "robot", "openpi.policies.tabletop_policy", tabletop_policy.TabletopInputs, tabletop_policy.TabletopOutputs
    ),
    *_entries("robot", "openpi.policies.ur5_policy", ur5_policy.UR5Inputs, ur5_policy.UR5Outputs),
    *_entries(
        "codec",
        "openpi.codecs.observation",
        observation.Vector,
        observation.Camera,
        observation.ObservationCodec,
        observation.Rename,
    ),
    *_entries(
        "codec",
        "openpi.codecs.action",
        action.CartesianPose,
        action.JointPositions,
        action.JointDelta,
        action.BinariseGrip,
    ),
    *_entries("codec", "openpi.codecs.timing", timing.Timing),
)

# Functions that a file refers to; they are called with the model's config (transforms) or a parameter's path (filters).
FUNCTIONS: tuple[Entry, ...] = (
    *_entries("freeze", "openpi.models.model_config", model_config.freeze_nothing),
    *_entries("data", "openpi.training.data_config", data_config.no_transforms, data_config.droid_transforms),
    *_entries("data", "openpi.training.recipes.calvin", calvin.calvin_transforms),
    *_entries("data", "openpi.training.recipes.roboarena", roboarena.joint_position_transforms),
    *_entries("data", "openpi.training.recipes.tabletop", tabletop.tabletop_transforms),
)

# Classes of action tokenizers; made with the numbers and paths of `Pi0FASTConfig`.
TOKENIZERS: tuple[Entry, ...] = tuple(
    _entries(
        "tokenizer",
        "openpi.models.tokenizer",
        tokenizer.BinningTokenizer,
        tokenizer.FASTTokenizer,
        tokenizer.FSQTokenizer,
    )
)

# Fields that an earlier version of a type had: name of the type -> field -> what became of it. Files that have them are
# read without, and it is said.
GONE_FIELDS: Mapping[str, Mapping[str, str]] = {}

_ENTRIES = (*TYPES, *FUNCTIONS, *TOKENIZERS)
_BY_NAME = {entry.name: entry for entry in _ENTRIES}
_BY_VALUE = {entry.value: entry for entry in _ENTRIES}
_NEW_NAMES = {entry.old_name: entry.name for entry in _ENTRIES if entry.old_name is not None}
assert len(_BY_NAME) == len(_BY_VALUE) == len(_ENTRIES), "two entries of the table share a name or a value"


def name_of(value: Any) -> str | None:
    """What files call a class or function; None = it is not of ours to name."""
    entry = _BY_VALUE.get(value)
    return None if entry is None else entry.name


def new_name(old_name: str) -> str | None:
    """What files of today call a `module:QualName` of version 1; None = nothing of ours."""
    return _NEW_NAMES.get(old_name)


def names() -> list[str]:
    """Everything that can be named."""
    return sorted(_BY_NAME)


def find_type(name: str) -> type | None:
    """The dataclass of that name."""
    return _find(name, TYPES, dataclasses.is_dataclass)


def find_enum(name: str) -> type[enum.Enum] | None:
    """The enumeration of that name."""
    return _find(name, TYPES, lambda value: issubclass(value, enum.Enum))


def find_reference(name: str) -> Callable[..., Any] | None:
    """The function or tokenizer class of that name."""
    return _find(name, (*FUNCTIONS, *TOKENIZERS), callable)


def is_tokenizer(value: Any) -> bool:
    """Whether it is one of the tokenizer classes."""
    return any(entry.value is value for entry in TOKENIZERS)


def _find(name: str, entries: tuple[Entry, ...], is_meant: Callable[[Any], bool]) -> Any:
    entry = _BY_NAME.get(name)
    return entry.value if entry is not None and entry in entries and is_meant(entry.value) else None
