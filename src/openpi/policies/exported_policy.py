"""Policies of the first release's exported models: a robot's transforms around a frozen graph.

What was around a graph then is not in its folder, so it is here, per robot: the transforms, the published model and the
name of its normalisation. Source: the training specification, section 4.8.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openpi import transforms as _transforms
from openpi.models.model_config import ModelType
from openpi.models.tokenizer import PaligemmaTokenizer
from openpi.policies import aloha_policy, calvin_policy, droid_policy, libero_policy
from openpi.policies.policy import Policy
from openpi.policies.robot_spec import RobotSpec
from openpi.shared import download, frameworks
from openpi.shared.image_tools import resize_with_pad
from openpi.shared.tree import Tree
from openpi.transforms import DataTransformFn
from openpi.weights import names, opening
from openpi.weights.blocks import Weights

if TYPE_CHECKING:
    from openpi.models.exported import ExportedModel, Graph
    from openpi.shared.normalize import NormStats

logger = logging.getLogger(__name__)

_NUM_STEPS = 10
_DECODER = "decoder/"
# CALVIN's oldest graph calls the slots as its simulator calls the cameras.
_OLD_SLOTS = {"rgb_static": "base_0_rgb", "rgb_gripper": "left_wrist_0_rgb"}
_OLD_ALOHA_CAMERAS = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")


@dataclasses.dataclass(frozen=True)
class OldAlohaKeys:
    """What ALOHA clients of the first release sent, `qpos` float[14] and `image` [n, 3, h, w] of one camera or four, as
    today's keys; those pass through.
    """

    def __call__(self, data: dict) -> dict:
        if "qpos" not in data or "image" not in data:
            return data
        cameras = np.asarray(data["image"])
        if cameras.ndim != 4 or len(cameras) not in (1, len(_OLD_ALOHA_CAMERAS)):
            raise ValueError(
                f"'image' has shape {cameras.shape}; expected [n, 3, h, w] of one camera (high) or four (high, low, "
                "left wrist, right wrist), or send today's keys: images/cam_high ..., state"
            )
        images = dict(zip(_OLD_ALOHA_CAMERAS, cameras, strict=False))
        rest = {key: value for key, value in data.items() if key not in ("qpos", "image")}
        return {**rest, "state": np.asarray(data["qpos"]), "images": images}


@dataclasses.dataclass(frozen=True)
class OldAlohaActions:
    """The actions also by the name that those clients read, `qpos`."""

    def __call__(self, data: dict) -> dict:
        return {**data, "qpos": data["actions"]}


@dataclasses.dataclass(frozen=True)
class Robot:
    """What the first release put around the graphs for a robot.

    Attributes:
        model: name of its published model.
        processor: name of its statistics.
    """

    spec: RobotSpec
    model: str
    processor: str
    inputs: Sequence[DataTransformFn]
    outputs: Sequence[DataTransformFn]

    @property
    def url(self) -> str:
        return f"s3://openpi-assets/exported/{self.model}/model"


ROBOTS: Mapping[str, Robot] = {
    "aloha": Robot(
        aloha_policy.ALOHA_SPEC,
        "pi0_aloha",
        "trossen_biarm_single_base_cam_24dim",
        (OldAlohaKeys(), aloha_policy.AlohaInputs(adapt_to_pi=True)),
        (
            _transforms.AbsoluteActions(_transforms.make_bool_mask(6, -1, 6, -1)),
            aloha_policy.AlohaOutputs(adapt_to_pi=True),
            OldAlohaActions(),
        ),
    ),
    "aloha_sim": Robot(
        aloha_policy.ALOHA_SPEC,
        "pi0_aloha_sim",
        "huggingface_aloha_sim_transfer_cube",
        (OldAlohaKeys(), aloha_policy.AlohaInputs(adapt_to_pi=False)),
        (aloha_policy.AlohaOutputs(adapt_to_pi=False), OldAlohaActions()),
    ),
    "droid": Robot(
        droid_policy.DROID_SPEC,
        "pi0_droid",
        "openx_droid",
        (droid_policy.DroidInputs(ModelType.PI0),),
        (droid_policy.DroidOutputs(), _transforms.SubsampleActions(5)),
    ),
    "calvin": Robot(
        calvin_policy.CALVIN_SPEC,
        "pi0_calvin",
        "calvin",
        (calvin_policy.CalvinInputs(ModelType.PI0),),
        (calvin_policy.CalvinOutputs(),),
    ),
    "libero": Robot(
        libero_policy.LIBERO_SPEC,
        "pi0_libero",
        "libero",
        (libero_policy.LiberoInputs(ModelType.PI0),),
        (libero_policy.LiberoOutputs(),),
    ),
}


@dataclasses.dataclass(frozen=True)
class GraphImages:
    """The images of a graph's slots, in its sizes; a slot that the robot has no camera for is black and masked.

    Attributes:
        sizes: height and width by slot.
    """

    sizes: Mapping[str, tuple[int, int]]

    def __call__(self, data: dict) -> dict:
        images, masks = {}, {}
        for slot, (height, width) in self.sizes.items():
            source = slot if slot in data["image"] else _OLD_SLOTS.get(slot, slot)
            image = data["image"].get(source)
            black = np.zeros((height, width, 3), np.uint8)
            images[slot] = black if image is None else resize_with_pad(np.asarray(image), height, width)
            masks[slot] = np.bool_(data["image_mask"].get(source, False))
        return {**data, "image": images, "image_mask": masks}


class ExportedSampler:
    """Runs a graph on batches, sample by sample, as it takes one at a time; draws its own noise.

    Args:
        seed: a fresh process repeats the same sequence.
    """

    takes_noise = False
    compiles = False  # any number of samples is the same program

    def __init__(self, model: ExportedModel, *, seed: int = 0) -> None:
        self._model = model
        self._rng = np.random.default_rng(seed)
        self.action_horizon: int = model.action_horizon
        self.action_dim: int = model.action_dim

    def sample(self, inputs: Tree, noise: np.ndarray | None, **sample_kwargs: object) -> np.ndarray:
        """f32[b ah ad], of `GraphImages` and tokens; `noise` is None."""
        assert noise is None
        count = len(inputs["state"])
        return np.stack(
            [self._one(_row(inputs, i), int(self._rng.integers(1 << 31)), sample_kwargs) for i in range(count)]
        )

    def warm_up(self, inputs: Mapping[str, object], **sample_kwargs: object) -> None:
        """Compiles; the sequence of noise stays where it is."""
        self._one(_row(inputs, 0), 0, sample_kwargs)

    def _one(self, inputs: Mapping[str, object], seed: int, sample_kwargs: Mapping[str, object]) -> np.ndarray:
        return self._model.sample_actions(seed, _example(inputs, self._model.example_spec), sample_kwargs)


def load(folder: Path, robot: Robot, *, processor: str | None = None, default_prompt: str | None = None) -> Policy:
    """The policy of an exported model in a local folder.

    Args:
        processor: name of its statistics; None = the robot's default if it is there, else the only one.
    Raises:
        FileNotFoundError: the folder has no graph.
        ValueError: there is no such processor, the files are damaged, or they are of another robot.
        ImportError: the extra `exported` is not installed.
    """
    frameworks.require("jax", "an exported model")
    from openpi.models import exported

    folder = find(folder) or folder
    name = exported.choose_processor(folder, processor, robot.processor)
    norm_stats = exported.load_norm_stats(folder, name)
    graph = exported.Graph.read(folder)
    _check_fits(graph, robot, norm_stats, f"{folder} with processor {name!r}")
    graph.check_platform()
    logger.info("Loading %s with processor '%s'", folder, name)
    model = exported.ExportedModel.load(folder)
    sizes = _image_sizes(graph)
    inputs = [
        _transforms.InjectDefaultPrompt(default_prompt),
        *robot.inputs,
        # Statistics of that generation are as wide as the model, and of the padded state.
        _transforms.PadStatesAndActions(min(norm_stats["state"].width, graph.example_spec["state"].shape[-1])),
        _transforms.Normalize(norm_stats),
        _transforms.PadStatesAndActions(graph.example_spec["state"].shape[-1]),
        GraphImages(sizes),
        _transforms.TokenizePrompt(PaligemmaTokenizer(graph.max_token_len)),
    ]
    outputs = [_transforms.Unnormalize(norm_stats), *robot.outputs]
    return Policy(
        ExportedSampler(model),
        transforms=inputs,
        output_transforms=outputs,
        sample_kwargs={"num_steps": _NUM_STEPS},
    )


def dims(folder: Path) -> dict[str, int]:
    """The fields of a model's configuration that a graph and its weights have of their own."""
    from openpi.models import exported
    from openpi.weights import orbax_parts

    graph = exported.Graph.read(folder)
    found = {"action_horizon": graph.action_horizon, "max_token_len": graph.max_token_len}
    kernel = orbax_parts.open_arrays(folder).get(f"{_DECODER}action_in_proj/kernel")
    return found if kernel is None else {**found, "action_dim": kernel.shape[0]}


def open_weights(config: object, folder: Path) -> Weights:
    """The weights of an exported model, compared with a model by names and shapes; its graph is not asked.

    Raises:
        ValueError: as of `openpi.weights.opening.open_weights`.
    """
    from openpi.weights import orbax_parts

    stored = orbax_parts.open_arrays(folder)
    decoder = {path.removeprefix(_DECODER): array for path, array in stored.items() if path.startswith(_DECODER)}
    return opening.of_arrays(names.rows(config), decoder, source=str(folder))


def find(place: Path | str) -> Path | None:
    """The folder with the graph at a place, or in its `model/`; None where there is no exported model."""
    folder = download.maybe_download(place)
    return next((found for found in (folder, folder / "model") if (found / "graph").is_file()), None)


def _check_fits(graph: Graph, robot: Robot, norm_stats: Mapping[str, NormStats], source: str) -> None:
    """Before weights are read."""
    if set(graph.sample_spec) != {"num_steps"}:
        raise ValueError(
            f"the graph of {source} takes the options {sorted(graph.sample_spec)}; expected num_steps alone"
        )
    needed, widths = len(robot.spec.state_names), {key: stats.width for key, stats in norm_stats.items()}
    model = graph.example_spec["state"].shape[-1]
    if not needed <= widths["state"] <= model:
        raise ValueError(
            f"{source} has statistics of {widths['state']} state values and a model of {model}, and {robot.spec.robot} "
            f"sends {needed}: it is of another robot. Name another --env or --policy.processor"
        )
    if widths["actions"] > graph.action_dim:
        raise ValueError(
            f"{source} has statistics of {widths['actions']} action values, and its model {graph.action_dim}"
        )
    known = {camera.slot for camera in robot.spec.cameras if camera.slot}
    slots = _image_sizes(graph)
    used = {_OLD_SLOTS.get(slot, slot) for slot in slots} & known
    if not used:
        raise ValueError(f"{source} looks at {', '.join(slots)}, and {robot.spec.robot} has {', '.join(sorted(known))}")
    if used != known:
        logger.warning("the graph does not look at %s of %s", ", ".join(sorted(known - used)), robot.spec.robot)


def _image_sizes(graph: Graph) -> dict[str, tuple[int, int]]:
    images = graph.example_spec["image"]
    return {slot: spec.shape[:2] for slot, spec in images.items() if not slot.endswith("_mask")}


def _example(inputs: Tree, spec: Tree) -> dict[str, object]:
    """Model-side inputs as a graph takes them; some name the mask otherwise and want two more."""
    masks = {f"{slot}_mask": mask for slot, mask in inputs["image_mask"].items()}
    tokens, is_token = inputs["tokenized_prompt"], inputs["tokenized_prompt_mask"]
    mask_name = "mask_prompt_input" if "mask_prompt_input" in spec else "mask_input"
    fixed = {"allow_action_diffusion_attention": np.zeros, "mask_ar": np.ones}
    return {
        "image": {**inputs["image"], **masks},
        "state": inputs["state"],
        "prompt_tokens": tokens,
        mask_name: is_token,
        **{name: make(spec[name].shape, spec[name].dtype) for name, make in fixed.items() if name in spec},
    }


def _row(inputs: Tree, index: int) -> dict[str, object]:
    return {
        key: _row(value, index) if isinstance(value, Mapping) else value[index]
        for key, value in inputs.items()
        if key != "prompt"
    }
