"""From a dataset to model inputs, as data: which keys, which transforms, which statistics.

`DataConfigFactory` is what a recipe holds; `create()` expands it, for one model, to the `DataConfig` that the loader
and the policy run. Source: the training specification, sections 3, 5.4 and 6. No JAX here.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openpi import transforms
from openpi.data.selection import ERRORS, Selection
from openpi.models import tokenizer as _tokenizer
from openpi.models.model_config import IMAGE_RESOLUTION, BaseModelConfig, ModelType
from openpi.policies import aloha_policy, data_half, droid_policy, libero_policy, ur5_policy
from openpi.shared import download, normalize
from openpi.shared.ranges import Count, WholeNumber
from openpi.training.droid_rlds_dataset import DroidActionSpace, RLDSDataset

logger = logging.getLogger(__name__)

HIDDEN: dict[str, Any] = {"cli": False}  # metadata of fields that are data structures, not command-line flags

DROID_SHUFFLE_BUFFER = 250_000
DROID_FRAME_RANGES = "gs://openpi-assets/droid/droid_sample_ranges_v1_0_1.json"


@dataclasses.dataclass(frozen=True)
class AssetsConfig:
    """Where normalisation statistics are read, and where `openpi stats` and `openpi train` write them.

    Attributes:
        assets_dir: folder, local or remote; None = `<assets_base_dir>/<recipe name>`.
        asset_id: sub-folder, one per robot; None = the dataset's repo id.
    """

    assets_dir: str | None = None
    asset_id: str | None = None

    def __post_init__(self) -> None:
        if self.asset_id is not None and _leads_out(self.asset_id):
            raise ValueError(
                f"assets.asset_id='{self.asset_id}' leads out of the assets folder; expected a name such as 'trossen'. "
                "Put the folder in assets.assets_dir"
            )


def _leads_out(name: str) -> bool:
    return Path(name).is_absolute() or ".." in Path(name).parts


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Everything the loader and the policy need to know about the data of one recipe.

    Attributes:
        repo_id: dataset: hub name, or a local folder; None = inference only; `fake` = random samples.
        asset_id: which statistics.
        norm_stats: per key (`state`, `actions`); None where no file was found.
        repack_transforms: dataset keys -> client keys; training only.
        data_transforms: robot <-> model conventions, on un-normalised values.
        model_transforms: resizing, tokens, padding, on normalised values.
        use_quantile_norm: q01..q99 to [-1, 1] instead of z-scores.
        action_sequence_keys: dataset columns that are read as chunks of `action_horizon` steps.
        prompt_from_task: put the text of the frame's task under `prompt`.
        rlds_data_dir, action_space, datasets, shuffle_buffer_size: of DROID in RLDS form.
        local_files_only: never ask the hub for the dataset, as in configs of the first release.
        exclude_episodes, exclude_findings, exclude_kinds, exclude_where: episodes that are neither trained on nor
            validated with, because they are spoilt; see `Selection`.
        validation_episodes: numbers of episodes held out of training for validation.
        mixture: all datasets of a mixture, this one the first; empty = there is only this one.
    """

    repo_id: str | None = None
    asset_id: str | None = None
    norm_stats: dict[str, normalize.NormStats] | None = None
    repack_transforms: transforms.Group = dataclasses.field(default_factory=transforms.Group, metadata=HIDDEN)
    data_transforms: transforms.Group = dataclasses.field(default_factory=transforms.Group, metadata=HIDDEN)
    model_transforms: transforms.Group = dataclasses.field(default_factory=transforms.Group, metadata=HIDDEN)
    use_quantile_norm: bool = False
    action_sequence_keys: Sequence[str] = ("actions",)
    prompt_from_task: bool = False
    rlds_data_dir: str | None = None
    action_space: DroidActionSpace | None = None
    datasets: Sequence[RLDSDataset] = ()
    shuffle_buffer_size: Count = DROID_SHUFFLE_BUFFER
    local_files_only: bool = False
    exclude_episodes: Sequence[WholeNumber] = ()
    exclude_findings: str | None = None
    exclude_kinds: Sequence[str] = ERRORS
    exclude_where: str | None = None
    validation_episodes: Sequence[WholeNumber] = ()
    mixture: Sequence[MixedDataset] = dataclasses.field(default=(), metadata=HIDDEN)

    @property
    def members(self) -> tuple[DataConfig, ...]:
        """The datasets that are read: those of a mixture, or this one."""
        return tuple(part.config for part in self.mixture) or (self,)

    @property
    def selection(self) -> Selection:
        """Which episodes are left out."""
        return Selection(self.exclude_episodes, self.exclude_findings, self.exclude_kinds, self.exclude_where)

    @property
    def stream_format(self) -> str | None:
        """Which `openpi.streams` reads the data; None where they have random access, or there are none."""
        return None if self.rlds_data_dir is None else "droid_rlds"

    @property
    def dataset_name(self) -> str | None:
        """For messages; None in recipes that only serve."""
        if self.mixture:
            return " + ".join(f"{part.share:.4g} {part.config.repo_id}" for part in self.mixture)
        if self.rlds_data_dir is None:
            return self.repo_id
        return " and ".join(f"{Path(self.rlds_data_dir) / each.name / each.version}" for each in self.datasets)


@dataclasses.dataclass(frozen=True)
class MixedDataset:
    """A dataset of a mixture, expanded.

    Attributes:
        share: of all samples.
        stats_dir: folder of its statistics; see `DataConfigFactory.stats_dir`.
    """

    config: DataConfig
    share: float
    stats_dir: str | None = None


GroupFactory = Callable[[BaseModelConfig], transforms.Group]


@dataclasses.dataclass(frozen=True)
class ModelTransformFactory:
    """The transforms that depend on the model only: prompt, image size, tokens, padding.

    Attributes:
        default_prompt: used for samples and requests that carry no prompt.
    """

    default_prompt: str | None = None

    def __call__(self, model_config: BaseModelConfig) -> transforms.Group:
        height, width = getattr(model_config, "image_resolution", IMAGE_RESOLUTION)
        prepare = (
            transforms.InjectDefaultPrompt(self.default_prompt),
            transforms.ResizeImages(height, width),
        )
        if model_config.model_type is ModelType.PI0_FAST:
            return _with_fast_tokens(prepare, model_config)
        return _with_prompt_tokens(prepare, model_config)


def _with_prompt_tokens(prepare: tuple[transforms.DataTransformFn, ...], model_config: Any) -> transforms.Group:
    tokenize = transforms.TokenizePrompt(
        # Configurations of users' own models have what is published: no tokenizer.
        _tokenizer.PaligemmaTokenizer(model_config.max_token_len, getattr(model_config, "tokenizer_path", None)),
        discrete_state_input=getattr(model_config, "discrete_state_input", model_config.model_type is ModelType.PI05),
    )
    return transforms.Group(inputs=(*prepare, tokenize, transforms.PadStatesAndActions(model_config.action_dim)))


def _with_fast_tokens(prepare: tuple[transforms.DataTransformFn, ...], model_config: Any) -> transforms.Group:
    """No padding: the action width of this model is the robot's own."""
    tokenizer_class = model_config.fast_model_tokenizer or _tokenizer.FASTTokenizer
    tokens = tokenizer_class(model_config.max_token_len, **model_config.tokenizer_arguments())
    horizon, dim = model_config.action_horizon, model_config.action_dim
    return transforms.Group(
        inputs=(*prepare, transforms.TokenizeFASTInputs(tokens)),
        outputs=(transforms.ExtractFASTActions(tokens, action_horizon=horizon, action_dim=dim),),
    )


@dataclasses.dataclass(frozen=True)
class DataConfigFactory(abc.ABC):
    """The data half of a recipe; subclasses know one robot's keys and conventions.

    Attributes:
        repo_id: dataset; may stay None in recipes that only serve.
        assets: where the statistics are.
        base_config: values for the `DataConfig` fields that the factory does not set itself.
        use_quantile_norm: None = what the model family was published with (quantiles for all but pi0).
        exclude_episodes: numbers of episodes of the dataset to leave out, such as those that are spoilt.
        exclude_findings: file of `openpi dataset check --json`; episodes with findings are left out.
        exclude_kinds: which findings: severities (`error`, `warning`), groups (`videos`), codes (`videos.frozen`).
        exclude_where: condition on episodes to leave out, such as `length < 50 or max(abs(diff(action))) > 0.5`.
        validation_episodes: numbers of episodes to hold out of training for validation, by name instead of
            `holdout_episodes`.
    """

    repo_id: str | None = None
    assets: AssetsConfig = dataclasses.field(default_factory=AssetsConfig)
    base_config: DataConfig | None = dataclasses.field(default=None, metadata=HIDDEN)
    use_quantile_norm: bool | None = dataclasses.field(default=None, kw_only=True)
    exclude_episodes: Sequence[WholeNumber] = dataclasses.field(default=(), kw_only=True)
    exclude_findings: str | None = dataclasses.field(default=None, kw_only=True)
    exclude_kinds: Sequence[str] = dataclasses.field(default=ERRORS, kw_only=True)
    exclude_where: str | None = dataclasses.field(default=None, kw_only=True)
    validation_episodes: Sequence[WholeNumber] = dataclasses.field(default=(), kw_only=True)

    @abc.abstractmethod
    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        """Expands to the full data configuration.

        Args:
            assets_dirs: the recipe's own assets folder, used when `assets.assets_dir` is None.
        """

    def create_base_config(self, assets_dirs: Path, model_config: BaseModelConfig | None = None) -> DataConfig:
        """`base_config` with the fields that every factory sets: names, statistics, kind of normalisation.

        Raises:
            ValueError: neither a model, which recipes of the first release leave out, nor `use_quantile_norm`.
        """
        use_quantile_norm = self.use_quantile_norm
        if use_quantile_norm is None:
            if model_config is None:
                raise ValueError(
                    f"{type(self).__name__} calls create_base_config(assets_dirs) without the model, whose family says "
                    "how values are normalised; call create_base_config(assets_dirs, model_config), or set "
                    "data.use_quantile_norm: True for pi0.5 and pi0-FAST, False for pi0"
                )
            use_quantile_norm = model_config.model_type is not ModelType.PI0
        base = self.base_config or DataConfig()
        return dataclasses.replace(
            base,
            repo_id=self.repo_id,
            asset_id=self.asset_id,
            norm_stats=self._load_norm_stats(assets_dirs),
            use_quantile_norm=use_quantile_norm,
            exclude_episodes=(*base.exclude_episodes, *self.exclude_episodes),
            exclude_findings=self.exclude_findings or base.exclude_findings,
            exclude_kinds=base.exclude_kinds if self.exclude_kinds == ERRORS else self.exclude_kinds,
            exclude_where=self.exclude_where or base.exclude_where,
            validation_episodes=(*base.validation_episodes, *self.validation_episodes),
        )

    @property
    def members(self) -> tuple[DataConfigFactory, ...]:
        """The datasets that are read, each as a data half of its own."""
        return (self,)

    @property
    def with_own_statistics(self) -> tuple[DataConfigFactory, ...]:
        """Those of which statistics are computed, each on its own."""
        return (self,)

    @property
    def asset_id(self) -> str | None:
        """Which statistics: a relative folder. That of a dataset given as a folder is the folder's name."""
        if self.assets.asset_id is not None:
            return self.assets.asset_id
        if self.repo_id is None or not (self.repo_id.startswith(("/", ".", "~")) or _leads_out(self.repo_id)):
            return self.repo_id
        name = Path(self.repo_id).name
        return "" if name == ".." else name

    def stats_dir(self, assets_dirs: Path | str) -> str | None:
        """Folder of `norm_stats.json`, read and written; may be remote. None without an asset id."""
        if self.asset_id is None:
            return None
        return f"{str(self.assets.assets_dir or assets_dirs).rstrip('/')}/{self.asset_id}"

    def _load_norm_stats(self, assets_dirs: Path) -> dict[str, normalize.NormStats] | None:
        """None where there are none: a recipe must be usable for serving, where they come from the checkpoint."""
        if (given := data_half.given_statistics()) is not None:
            return None if given.norm_stats is None else dict(given.norm_stats)
        folder = self.stats_dir(assets_dirs)
        if folder is None:
            return None
        try:
            return normalize.load(download.maybe_download(folder))
        except FileNotFoundError:
            logger.debug("no normalisation statistics in %s", folder)
        except (OSError, ImportError) as error:
            logger.warning("cannot reach the normalisation statistics in %s: %s", folder, error)
        return None


@dataclasses.dataclass(frozen=True)
class FakeDataConfig(DataConfigFactory):
    """Random samples with the shapes that the model takes; for trying out a model or a machine."""

    repo_id: str | None = "fake"

    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        return DataConfig(repo_id=self.repo_id)


def no_transforms(model_config: BaseModelConfig) -> transforms.Group:
    """The group factory of a dataset that already speaks the model's language."""
    del model_config
    return transforms.Group()


@dataclasses.dataclass(frozen=True)
class SimpleDataConfig(DataConfigFactory):
    """Transforms given as functions of the model config; what inference-only recipes use."""

    data_transforms: GroupFactory = dataclasses.field(default=no_transforms, metadata=HIDDEN)
    model_transforms: GroupFactory = dataclasses.field(default_factory=ModelTransformFactory, metadata=HIDDEN)

    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        return dataclasses.replace(
            self.create_base_config(assets_dirs, model_config),
            data_transforms=self.data_transforms(model_config),
            model_transforms=self.model_transforms(model_config),
        )


def repack(structure: Mapping[str, object]) -> transforms.Group:
    """Dataset keys -> client keys; `structure` maps the latter to the former."""
    return transforms.Group(inputs=(transforms.RepackTransform(structure),))


def with_delta_actions(group: transforms.Group, mask: Sequence[bool]) -> transforms.Group:
    """Trains on actions relative to the state where `mask` is true, and undoes it on the way out."""
    return group.push(inputs=(transforms.DeltaActions(mask),), outputs=(transforms.AbsoluteActions(mask),))


ALOHA_DELTA_MASK = transforms.make_bool_mask(6, -1, 6, -1)
LIBERO_DELTA_MASK = transforms.make_bool_mask(6, -1)
UR5_DELTA_MASK = transforms.make_bool_mask(6, -1)
DROID_DELTA_MASK = transforms.make_bool_mask(7, -1)


def _aloha_top_camera() -> transforms.Group:
    return repack({"images": {"cam_high": "observation.images.top"}, "state": "observation.state", "actions": "action"})


@dataclasses.dataclass(frozen=True)
class LeRobotAlohaDataConfig(DataConfigFactory):
    """Two-armed ALOHA-like robots, 14 joints: left arm 6, left gripper, right arm 6, right gripper.

    Attributes:
        use_delta_joint_actions: train on joint targets relative to the state; grippers stay absolute.
        default_prompt: for datasets without task texts.
        adapt_to_pi: convert joint signs and gripper ranges to the space the base models were trained in. For
            robots with the conventions of the standard ALOHA only.
        repack_transforms: dataset keys -> `images/cam_*`, `state`, `actions`, `prompt`.
    """

    use_delta_joint_actions: bool = True
    default_prompt: str | None = None
    adapt_to_pi: bool = True
    repack_transforms: transforms.Group = dataclasses.field(default_factory=_aloha_top_camera, metadata=HIDDEN)
    action_sequence_keys: Sequence[str] = ("action",)

    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        data_transforms = transforms.Group(
            inputs=(aloha_policy.AlohaInputs(adapt_to_pi=self.adapt_to_pi),),
            outputs=(aloha_policy.AlohaOutputs(adapt_to_pi=self.adapt_to_pi),),
        )
        if self.use_delta_joint_actions:
            data_transforms = with_delta_actions(data_transforms, ALOHA_DELTA_MASK)
        return dataclasses.replace(
            self.create_base_config(assets_dirs, model_config),
            repack_transforms=self.repack_transforms,
            data_transforms=data_transforms,
            model_transforms=ModelTransformFactory(default_prompt=self.default_prompt)(model_config),
            action_sequence_keys=self.action_sequence_keys,
        )


@dataclasses.dataclass(frozen=True)
class LeRobotLiberoDataConfig(DataConfigFactory):
    """LIBERO in the published conversion: one arm, 8 state values, 7 actions that are already relative.

    Attributes:
        extra_delta_transform: subtract the state once more; pi0 and pi0-FAST checkpoints were trained so.
    """

    extra_delta_transform: bool = False

    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        data_transforms = transforms.Group(
            inputs=(libero_policy.LiberoInputs(model_type=model_config.model_type),),
            outputs=(libero_policy.LiberoOutputs(),),
        )
        if self.extra_delta_transform:
            data_transforms = with_delta_actions(data_transforms, LIBERO_DELTA_MASK)
        return dataclasses.replace(
            self.create_base_config(assets_dirs, model_config),
            repack_transforms=repack(
                {
                    "observation/image": "image",
                    "observation/wrist_image": "wrist_image",
                    "observation/state": "state",
                    "actions": "actions",
                    "prompt": "prompt",
                }
            ),
            data_transforms=data_transforms,
            model_transforms=ModelTransformFactory()(model_config),
        )


@dataclasses.dataclass(frozen=True)
class LeRobotUR5DataConfig(DataConfigFactory):
    """One UR5 arm: six absolute joints, trained relative to the state, and an absolute gripper."""

    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        data_transforms = transforms.Group(
            inputs=(ur5_policy.UR5Inputs(model_type=model_config.model_type),),
            outputs=(ur5_policy.UR5Outputs(),),
        )
        names = {"base_rgb": "image", "wrist_rgb": "wrist_image"}
        same = {key: key for key in ("joints", "gripper", "actions", "prompt")}
        return dataclasses.replace(
            self.create_base_config(assets_dirs, model_config),
            repack_transforms=repack(names | same),
            data_transforms=with_delta_actions(data_transforms, UR5_DELTA_MASK),
            model_transforms=ModelTransformFactory()(model_config),
        )


def droid_transforms(model_config: BaseModelConfig) -> transforms.Group:
    """DROID conventions for any model family; actions as they come (velocities in the released checkpoints)."""
    return transforms.Group(
        inputs=(droid_policy.DroidInputs(model_type=model_config.model_type),),
        outputs=(droid_policy.DroidOutputs(),),
    )


@dataclasses.dataclass(frozen=True)
class LeRobotDROIDDataConfig(DataConfigFactory):
    """A small DROID-like dataset in LeRobot format, with the keys of the DROID conversion script."""

    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        observations = (
            "exterior_image_1_left",
            "exterior_image_2_left",
            "wrist_image_left",
            "joint_position",
            "gripper_position",
        )
        return dataclasses.replace(
            self.create_base_config(assets_dirs, model_config),
            repack_transforms=repack(
                {f"observation/{key}": key for key in observations} | {"actions": "actions", "prompt": "prompt"}
            ),
            data_transforms=droid_transforms(model_config),
            model_transforms=ModelTransformFactory()(model_config),
        )


@dataclasses.dataclass(frozen=True)
class RLDSDroidDataConfig(DataConfigFactory):
    """The full DROID dataset, or a mixture with it, in RLDS form.

    Attributes:
        rlds_data_dir: the folder that holds `<name>/<version>` of every dataset.
        action_space: what the arm's actions are: positions, which are trained relative to the state, or velocities;
            None = positions as they are.
        datasets: mixture.
        shuffle_buffer_size: frames that wait in memory, of all processes together, some 25 KB each; below 100 000 the
            batches of DROID are noticeably less random.
    """

    rlds_data_dir: str | None = None
    action_space: DroidActionSpace | None = None
    datasets: Sequence[RLDSDataset] = (
        RLDSDataset(name="droid", version="1.0.1", weight=1.0, filter_dict_path=DROID_FRAME_RANGES),
    )
    shuffle_buffer_size: Count = DROID_SHUFFLE_BUFFER

    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        if self.rlds_data_dir is None:
            raise ValueError(
                "data.rlds_data_dir is not set; expected the folder that holds "
                f"{', '.join(f'{d.name}/{d.version}' for d in self.datasets)}. Pass --data.rlds-data-dir"
            )
        data_transforms = droid_transforms(model_config)
        if self.action_space is DroidActionSpace.JOINT_POSITION:
            data_transforms = with_delta_actions(data_transforms, DROID_DELTA_MASK)
        arm = ("joint_position", "gripper_position")
        return dataclasses.replace(
            self.create_base_config(assets_dirs, model_config),
            repack_transforms=repack(
                {
                    "observation/exterior_image_1_left": "observation/image",
                    "observation/wrist_image_left": "observation/wrist_image",
                    **{f"observation/{key}": f"observation/{key}" for key in arm},
                    "actions": "actions",
                    "prompt": "prompt",
                }
            ),
            data_transforms=data_transforms,
            model_transforms=ModelTransformFactory()(model_config),
            rlds_data_dir=self.rlds_data_dir,
            action_space=self.action_space,
            datasets=self.datasets,
            shuffle_buffer_size=self.shuffle_buffer_size,
        )
