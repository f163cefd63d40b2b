"""Everything that a recipe's file may name, and under which name: files hold data, and this table gives it meaning.

A name in a file is `<subject>.<name>` and stays what it is wherever the class moves; what is not listed here cannot be
named by a file, so nothing else is ever imported, looked up or called for one. Files of version 1 named import paths
(`module:QualName`), which are kept as aliases.

Packages list theirs by the entry point `openpi.recipe_types`: any name -> a tuple of `Entry`, dataclasses and
enumerations.

To add something: list it. To rename or move it: nothing changes here but the import, and `Entry` in place of `entries`
if its own name changed.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from openpi import transforms
from openpi.models import gemma_config, model_config, pi0_config, pi0_fast_config, siglip_config, tokenizer
from openpi.policies import (
    aloha_policy,
    calvin_policy,
    droid_policy,
    libero_policy,
    robot_inputs,
    robot_spec,
    tabletop_policy,
    ur5_policy,
)
from openpi.shared import moved_modules, normalize, plugins
from openpi.training import (
    config,
    data_config,
    droid_rlds_dataset,
    freeze,
    mixture_config,
    optimizer,
    weight_loaders,
)
from openpi.training.recipes import calvin, roboarena, tabletop

ENTRY_POINTS = "openpi.recipe_types"


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


def entries(subject: str, old_module: str, *values: Callable[..., object]) -> Iterator[Entry]:
    for value in values:
        yield Entry(value, f"{subject}.{value.__name__}", f"{old_module}:{value.__name__}")


# Dataclasses and enumerations: a file gives their fields, which are checked against the declared types.
TYPES: tuple[Entry, ...] = (
    *entries("recipe", "openpi.training.config", config.TrainConfig),
    *entries("model", "openpi.models.pi0_config", pi0_config.Pi0Config),
    *entries("model", "openpi.models.pi0_fast_config", pi0_fast_config.Pi0FASTConfig),
    *entries("model", "openpi.models.gemma_config", gemma_config.GemmaConfig, gemma_config.LoRAConfig),
    *entries("model", "openpi.models.siglip_config", siglip_config.SiglipConfig),
    *entries("model", "openpi.models.model_config", model_config.ModelType),
    *entries("freeze", "openpi.training.freeze", freeze.All, freeze.Any, freeze.Not, freeze.PathRegex),
    *entries("freeze", "openpi.models.pi0_config", pi0_config.LoRAFreeze),
    *entries(
        "weights",
        "openpi.training.weight_loaders",
        weight_loaders.NoOpWeightLoader,
        weight_loaders.CheckpointWeightLoader,
        weight_loaders.PaliGemmaWeightLoader,
    ),
    *entries(
        "optimizer",
        "openpi.training.optimizer",
        optimizer.AdamW,
        optimizer.SGD,
        optimizer.Muon,
        optimizer.CosineDecaySchedule,
        optimizer.RsqrtDecaySchedule,
    ),
    *entries(
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
    *(
        Entry(value, f"data.{value.__name__}")
        for value in (mixture_config.MixtureDataConfig, mixture_config.MixturePart)
    ),
    *entries(
        "data",
        "openpi.training.droid_rlds_dataset",
        droid_rlds_dataset.RLDSDataset,
        droid_rlds_dataset.DroidActionSpace,
    ),
    *entries("data", "openpi.shared.normalize", normalize.NormStats),
    *entries(
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
    *entries("robot", "openpi.policies.robot_spec", robot_spec.CameraSpec, robot_spec.VectorSpec, robot_spec.RobotSpec),
    *entries("robot", "openpi.policies.robot_inputs", robot_inputs.RobotInputs, robot_inputs.RobotOutputs),
    *entries("robot", "openpi.policies.aloha_policy", aloha_policy.AlohaInputs, aloha_policy.AlohaOutputs),
    *entries("robot", "openpi.policies.calvin_policy", calvin_policy.CalvinInputs, calvin_policy.CalvinOutputs),
    *entries("robot", "openpi.policies.droid_policy", droid_policy.DroidInputs, droid_policy.DroidOutputs),
    *entries("robot", "openpi.policies.libero_policy", libero_policy.LiberoInputs, libero_policy.LiberoOutputs),
    *entries(
        "robot", "openpi.policies.tabletop_policy", tabletop_policy.TabletopInputs, tabletop_policy.TabletopOutputs
    ),
    *entries("robot", "openpi.policies.ur5_policy", ur5_policy.UR5Inputs, ur5_policy.UR5Outputs),
)

# Functions that a file refers to; they are called with the model's config (transforms) or a parameter's path (filters).
FUNCTIONS: tuple[Entry, ...] = (
    *entries("freeze", "openpi.models.model_config", model_config.freeze_nothing),
    *entries("data", "openpi.training.data_config", data_config.no_transforms, data_config.droid_transforms),
    *entries("data", "openpi.training.recipes.calvin", calvin.calvin_transforms),
    *entries("data", "openpi.training.recipes.roboarena", roboarena.joint_position_transforms),
    *entries("data", "openpi.training.recipes.tabletop", tabletop.tabletop_transforms),
)

# Classes of action tokenizers; made with the numbers and paths of `Pi0FASTConfig`.
TOKENIZERS: tuple[Entry, ...] = tuple(
    entries(
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


class _Table:
    """Everything that is listed, here and by packages; made on first use, because packages import what is here.

    Raises:
        ValueError: two entries share a name or a value.
    """

    def __init__(self) -> None:
        added = [entry for name in plugins.names(ENTRY_POINTS) for entry in plugins.load(ENTRY_POINTS, name)]
        self.types = (*TYPES, *added)
        every = (*self.types, *FUNCTIONS, *TOKENIZERS)
        self.by_name = {entry.name: entry for entry in every}
        self.by_value = {entry.value: entry for entry in every}
        self.new_names = {entry.old_name: entry.name for entry in every if entry.old_name is not None}
        if not len(self.by_name) == len(self.by_value) == len(every):
            raise ValueError(
                f"entries of {ENTRY_POINTS} share a name or a value with each other or with openpi's: uninstall one of "
                f"the packages that bring {', '.join(plugins.names(ENTRY_POINTS))}"
            )


@functools.cache
def _table() -> _Table:
    return _Table()


def name_of(value: object) -> str | None:
    """What files call a class or function; None = it is not of ours to name."""
    entry = _table().by_value.get(value)
    return None if entry is None else entry.name


def new_name(old_name: str) -> str | None:
    """What files of today call a `module:QualName` of version 1; None = nothing of ours."""
    return _table().new_names.get(old_name)


def names() -> list[str]:
    """Everything that can be named."""
    return sorted(_table().by_name)


def hint(name: str) -> str:
    """How to install what has a name, of any version; empty if it is none of ours."""
    return plugins.hint(ENTRY_POINTS, name) or moved_modules.hint(name.partition(":")[0])


def find_type(name: str) -> type | None:
    """The dataclass of that name."""
    return _find(name, _table().types, dataclasses.is_dataclass)


def find_enum(name: str) -> type[enum.Enum] | None:
    """The enumeration of that name."""
    return _find(name, _table().types, lambda value: issubclass(value, enum.Enum))


def find_reference(name: str) -> Callable[..., object] | None:
    """The function or tokenizer class of that name."""
    return _find(name, (*FUNCTIONS, *TOKENIZERS), callable)


def is_tokenizer(value: object) -> bool:
    """Whether it is one of the tokenizer classes."""
    return any(entry.value is value for entry in TOKENIZERS)


def _find(name: str, entries: tuple[Entry, ...], is_meant: Callable[..., bool]) -> Any:
    entry = _table().by_name.get(name)
    return entry.value if entry is not None and entry in entries and is_meant(entry.value) else None
