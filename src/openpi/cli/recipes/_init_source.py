"""The text of the recipe that `openpi init` writes.

Everything that comes from the dataset enters the text as a Python literal, so no name in it can become code. Lines are
laid out as ruff would lay them out.
"""

from __future__ import annotations

import dataclasses
import string
import textwrap
from collections.abc import Mapping, Sequence

from openpi.cli.recipes._init_choices import Choice, Decision
from openpi.shared.errors import printable

_WIDTH = 88


@dataclasses.dataclass(frozen=True)
class Draft:
    """What goes into the text.

    Attributes:
        name: of the recipe, an identifier.
        dataset: folder or hub id.
        origin: what the dataset is, in words.
        robot: name of the robot; also the folder of its statistics.
        horizon: steps of an action chunk, and why.
        vectors: names of the dimensions of the vectors that state and actions are taken from.
        choices: constants, decided or open.
        has_tasks: whether the dataset has task texts.
    """

    name: str
    dataset: str
    origin: str
    robot: str
    horizon: Decision
    vectors: Mapping[str, Sequence[str]]
    choices: Sequence[Choice]
    has_tasks: bool


def source_of(draft: Draft) -> str:
    """The whole file."""
    is_open = any(not isinstance(choice, Decision) for choice in draft.choices)
    names = {key: tuple(names) for key, names in draft.vectors.items()}
    constants = [
        _assignment("DATASET", draft.dataset, f"{draft.origin} A folder, or user/name on the hub."),
        *(_constant(choice) for choice in draft.choices),
        _assignment(
            "NAMES",
            names,
            "Names of the dimensions, as in the dataset; numbered where it has none. Messages, the contract of a "
            "checkpoint and GRIPPERS use them.",
        ),
        _constant(draft.horizon),
    ]
    name = draft.name
    return _TEMPLATE.substitute(
        name=name,
        name_literal=_literal(name),
        tiny_literal=_literal(f"{name}_tiny"),
        imports=_imports(is_open=is_open, has_tasks=draft.has_tasks),
        constants="\n".join(constants).rstrip(),
        robot=_literal(draft.robot),
        prompt_key=', "prompt": "prompt"' if draft.has_tasks else "",
        has_tasks=draft.has_tasks,
        model_transforms="" if draft.has_tasks else _FIXED_PROMPT,
    )


def _imports(*, is_open: bool, has_tasks: bool) -> str:
    from_data_config = ["repack", "with_delta_actions"]
    if not has_tasks:
        from_data_config.insert(0, "ModelTransformFactory")
    lines = [
        *_IMPORTS,
        _import("openpi.training.data_config", from_data_config),
        *([_import("openpi.training.recipe.fill_in", ["FILL_IN"])] if is_open else []),
        *_MORE_IMPORTS,
    ]
    return "\n".join(lines) + "\n"


def _import(module: str, names: Sequence[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= _WIDTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def _constant(choice: Choice) -> str:
    if isinstance(choice, Decision):
        return _assignment(choice.name, choice.value, f"{choice.reason}.")
    choices = (choice.choices,) if choice.is_list else choice.choices
    arguments = "".join(f"    {_literal(argument, 4)},\n" for argument in (choice.question, *choices))
    comment = f"The dataset does not decide this. {choice.hint}".rstrip()
    return f"{_comment(comment)}{choice.name} = FILL_IN(\n{arguments})\n"


def _assignment(name: str, value: object, reason: str) -> str:
    literal = _literal(value, start=len(name) + 3)
    if isinstance(value, str) and len(name) + 3 + len(literal) > _WIDTH >= 4 + len(literal):
        literal = f"(\n    {literal}\n)"
    return f"{_comment(reason[:1].upper() + reason[1:])}{name} = {literal}\n"


def _comment(text: str) -> str:
    """Lines of a comment; what cannot be printed is escaped, so that nothing leaves the line."""
    return "".join(f"# {line}\n" for line in textwrap.wrap(printable(text), _WIDTH - 2, break_on_hyphens=False))


def _literal(value: object, indent: int = 0, start: int | None = None) -> str:
    """A literal on one line if it fits, else one item a line; `start` is where its line has got to."""
    flat = _flat(value)
    fits = (indent if start is None else start) + len(flat) + 1 <= _WIDTH
    if fits or not isinstance(value, (tuple, Mapping)) or not value:
        return flat
    inner, is_dict = indent + 4, isinstance(value, Mapping)
    if isinstance(value, Mapping):
        items = [f"{_flat(k)}: {_literal(v, inner, inner + len(_flat(k)) + 2)}" for k, v in value.items()]
    else:
        items = [_literal(item, inner) for item in value]
    body = "".join(f"{' ' * inner}{item},\n" for item in items)
    opening, closing = "{}" if is_dict else "()"
    return f"{opening}\n{body}{' ' * indent}{closing}"


def _flat(value: object) -> str:
    if isinstance(value, str):
        text = repr(value)
        # Double quotes, unless that needs more escapes.
        return f'"{text[1:-1]}"' if text[0] == "'" and '"' not in text and "\\'" not in text else text
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flat(k)}: {_flat(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_flat, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


_IMPORTS = (
    "from openpi.models.model_config import IMAGE_KEYS, BaseModelConfig",
    "from openpi.models.pi0_config import Pi0Config",
    "from openpi.policies.robot_inputs import RobotInputs, RobotOutputs",
    "from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec",
    _import("openpi.training.config", ["AssetsConfig", "DataConfig", "SimpleDataConfig", "TrainConfig"]),
)
_MORE_IMPORTS = (
    "from openpi.training.optimizer import CosineDecaySchedule",
    "from openpi.training.recipes.tabletop import TINY_PI05",
    "from openpi.training.weight_loaders import CheckpointWeightLoader",
)
_FIXED_PROMPT = "    model_transforms=ModelTransformFactory(default_prompt=PROMPT),\n"

_TEMPLATE = string.Template('''\
"""A robot and its recipes, drafted by `openpi init` from a dataset.

Every choice has its reason above it: read them once. Then

    openpi stats $name.py:tiny
    openpi explain $name.py:tiny --index=0
    openpi train $name.py:tiny --exp-name=try  # on a CPU: does everything fit?
    openpi train $name.py:config --exp-name=first
"""

import dataclasses

from openpi import transforms
$imports
$constants

CAMERAS = {
    "base_0_rgb": SCENE_CAMERA,
    "left_wrist_0_rgb": LEFT_WRIST_CAMERA,
    "right_wrist_0_rgb": RIGHT_WRIST_CAMERA,
}

# The robot, for training and serving alike. Write the units in place of "as recorded",
# such as rad or m: messages and the contract of a checkpoint show them.
SPEC = RobotSpec(
    robot=$robot,
    cameras=tuple(CameraSpec(key, slot) for slot, key in CAMERAS.items() if key),
    state=tuple(VectorSpec.uniform(key, NAMES[key], "as recorded") for key in STATE),
    actions=VectorSpec.uniform("actions", NAMES[ACTION], "as recorded"),
    action_kind="as recorded",
    # Whether an action equal to the state keeps the robot there; () = that is not known, and
    # the programs of the robot have to say how it holds.
    follows_state=(True,) * len(NAMES[ACTION]) if TRAIN_RELATIVE else (),
)


def robot_transforms(model_config: BaseModelConfig) -> transforms.Group:
    """What the robot sends -> what the model takes, and the model's actions back."""
    group = transforms.Group(
        inputs=(RobotInputs(SPEC, model_config.model_type),),
        outputs=(RobotOutputs(SPEC),),
    )
    # The policy returns actions as they were recorded, however they were trained.
    relative = SPEC.actions.mask_without(GRIPPERS)
    return with_delta_actions(group, relative) if TRAIN_RELATIVE else group


# The robot sends cameras and state under the names that they have in the dataset. To
# rename one, change its key here and in SPEC: {what the robot sends: feature}.
KEYS = {key: key for key in (*filter(None, CAMERAS.values()), *STATE)}

DATA = SimpleDataConfig(
    repo_id=DATASET,
    # Statistics are computed by `openpi stats`, or when training starts. If the base
    # knows this very robot, with these units, its own are better: AssetsConfig(
    # assets_dir="gs://openpi-assets/checkpoints/pi05_base/assets", asset_id="trossen").
    assets=AssetsConfig(asset_id=$robot),
    base_config=DataConfig(
        repack_transforms=repack(KEYS | {"actions": ACTION$prompt_key}),
        action_sequence_keys=(ACTION,),
        prompt_from_task=$has_tasks,
    ),
    data_transforms=robot_transforms,
$model_transforms)

# True: adapters are trained, in 23 GB of GPU memory. False: all weights, in 70 GB.
# These are the figures published with the model.
LORA = True

MODEL = Pi0Config(
    pi05=True,
    action_horizon=ACTION_HORIZON,
    paligemma_variant="gemma_2b_lora" if LORA else "gemma_2b",
    action_expert_variant="gemma_300m_lora" if LORA else "gemma_300m",
)

# The published start for a robot of one's own. For a Franka as in DROID: pi05_droid.
WEIGHTS = "gs://openpi-assets/checkpoints/pi05_base/params"

config = TrainConfig(
    name=$name_literal,
    model=MODEL,
    data=DATA,
    weight_loader=CheckpointWeightLoader(WEIGHTS),
    freeze_filter=MODEL.get_freeze_filter(),
    # With adapters, an average would keep a second copy of everything that is frozen.
    ema_decay=None if LORA else 0.99,
    num_train_steps=20_000,
)

# To try the pipeline out: 1.5 million parameters that start from nothing.
tiny = TrainConfig(
    name=$tiny_literal,
    model=dataclasses.replace(
        TINY_PI05,
        image_keys=IMAGE_KEYS,
        action_dim=MODEL.action_dim,
        action_horizon=ACTION_HORIZON,
        max_token_len=MODEL.max_token_len,
    ),
    data=DATA,
    lr_schedule=CosineDecaySchedule(
        warmup_steps=20,
        peak_lr=1e-3,
        decay_steps=400,
        decay_lr=1e-5,
    ),
    batch_size=16,
    num_workers=0,
    num_train_steps=400,
    log_interval=20,
    save_interval=200,
)
''')
