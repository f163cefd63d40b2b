"""Checks before anything long starts: the recipe, the dataset, its statistics, one sample all the way, the disk.

Every refusal names what was found, what was expected and what to do. Source: the training specification, section 14.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from openpi import transforms
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.data.batch_loader import SourceLoader
from openpi.data.dataset import Dataset, Sample
from openpi.data.lerobot.features import Feature, dimension_names
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.models.model_config import ModelType, freeze_nothing
from openpi.models.tokenizer import FASTTokenizer
from openpi.policies.contract import Contract
from openpi.policies.images import channel_means
from openpi.policies.robot_spec import find_spec
from openpi.shared.tree import Tree, flatten, unflatten
from openpi.training import data_loader, recipe_io
from openpi.training.backend import Backend
from openpi.training.config import TrainConfig
from openpi.training.data import dataset_look, holdout, recipe_data, seen, stats_in_use
from openpi.training.data.first_look import FirstLook
from openpi.training.data.recipe_data import RecipeData
from openpi.training.data.robot_actions import check_names, with_recorded_limits
from openpi.training.data.streams import Stream
from openpi.training.data_config import DataConfig, LeRobotLiberoDataConfig
from openpi.training.distributed import processes
from openpi.training.run import adapters, run_directory, tracking
from openpi.transforms import DataTransformFn

logger = logging.getLogger(__name__)

_NUM_SAMPLES_CHECKED = 8
_PLACEHOLDERS = ("<path_to", "your_hf_username", "/path/to/your")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What the loop reads.

    Attributes:
        config: with statistics.
        train: endless batches of the training episodes, resumable.
        holdout: batches of the episodes kept out; None when there are none.
        contract: what a policy trained on this data expects and gives; None for random data, and as `check_samples`.
        action_names: of the robot's action dimensions; empty when unknown.
        content: a digest of the recorded numbers, see `recipe_data.content_of`.
        held: of each dataset how many episodes it has, and the numbers of those kept out.
    """

    config: DataConfig
    train: Any
    holdout: Any | None
    contract: Contract | None
    action_names: tuple[str, ...] = ()
    content: str = ""
    held: tuple[tuple[int, list[int]], ...] = ()


def check_recipe(config: TrainConfig, backend: Backend) -> None:
    """Refuses recipes that cannot train, and warns of those that waste.

    Raises:
        ValueError: the reason and the fix.
    """
    config.checkpoint_dir  # noqa: B018  # raises without an experiment name
    if processes.is_first():
        tracking.check_installed(config)
    _check_dataset_name(config)
    _warn_of_deltas_of_deltas(config)
    recipe_io.recipe_values(config)  # raises what saving it would
    adapters.check_recipe(config, backend)
    backend.check()
    paths = backend.param_specs()
    frozen = [path for path in paths if config.freeze_filter(path)]
    if len(frozen) == len(paths):
        raise ValueError("freeze_filter freezes every parameter; nothing would be trained")
    has_adapters = any("lora" in path for path in paths)
    if has_adapters and not frozen:
        logger.warning(
            "the model has adapters (LoRA) but nothing is frozen: set freeze_filter=model.get_freeze_filter()"
        )
    if frozen and config.ema_decay is not None:
        logger.warning(
            "ema_decay=%s keeps a second copy of all weights, also of the %d frozen ones; None saves that memory",
            config.ema_decay,
            len(frozen),
        )
    _warn_of_memory(config, backend)


def _warn_of_memory(config: TrainConfig, backend: Backend) -> None:
    """Before weights are fetched and read: a machine without room ends the process without a word."""
    needed = backend.required_bytes(freeze_nothing) / config.fsdp_devices  # a checkpoint is the state
    there = backend.device_bytes or _host_bytes()
    if needed > there:
        logger.warning(
            "weights, moments and average take about %.1f GB on each device, which has %.1f GB, before gradients and "
            "activations: this run will probably end for lack of memory. `openpi train %s --plan` says what takes less",
            needed / 1e9,
            there / 1e9,
            config.name,
        )


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_dataset_name(config: TrainConfig) -> None:
    for data in config.data.members:
        rlds_data_dir = getattr(data, "rlds_data_dir", None)
        if data.repo_id is None and rlds_data_dir is None:
            raise ValueError(
                f"recipe '{config.name}' has no dataset: it serves a released checkpoint. Name one with "
                "--data.repo-id, or train another recipe"
            )
        for field, value in {"data.repo_id": data.repo_id, "data.rlds_data_dir": rlds_data_dir}.items():
            if value is not None and any(placeholder in str(value) for placeholder in _PLACEHOLDERS):
                flag = field.replace("_", "-")
                raise ValueError(f"{field}={value!r} is a placeholder of recipe '{config.name}'; set it with --{flag}")


def _warn_of_deltas_of_deltas(config: TrainConfig) -> None:
    # Other data configurations have a field of this name, for actions that are absolute.
    if isinstance(config.data, LeRobotLiberoDataConfig) and config.data.extra_delta_transform:
        logger.warning(
            "recipe '%s' subtracts the state from actions that are relative already, if they are LIBERO's, as released "
            "checkpoints were trained; new runs on them succeed more often without: add "
            "--data.no-extra-delta-transform and compute the statistics again, or train "
            "pi0_fast_libero_no_delta_transform",
            config.name,
        )


def check_weights(config: TrainConfig, backend: Backend) -> None:
    """Fetches the weights that a fresh run starts from, and compares their shapes with the model's.

    Every process of a run does: on a node without them, it would fetch them while the others wait in a collective.

    Raises:
        ValueError: they do not fit, or are damaged.
        FileNotFoundError, ConnectionError: they are not there.
    """
    adapters.check_base(config, backend)
    check = getattr(config.start_weights, "check", None)  # loaders of users need not have it
    if check is not None:
        check(unflatten(backend.param_specs()))
        adapters.check_scale(config)


def prepare(
    config: TrainConfig, data: RecipeData, *, num_devices: int, checkpoint: Checkpoint | None = None
) -> TrainingData:
    """Computes the statistics if there are none, and runs samples through everything.

    Called by all processes of a run; the first computes the statistics.

    Args:
        data: of the recipe.
        num_devices: of all processes together; every batch is a multiple of it.
        checkpoint: that the run continues from, and whose statistics it goes on with.
    Raises:
        ValueError, KeyError: the dataset does not fit the recipe; or it, or its statistics, are not the same in all
            processes.
    """
    data = stats_in_use.read(config, data, checkpoint)
    with processes.together("preparing the data"):
        prepared = _prepared(config, data, num_devices, checkpoint)
    processes.check_same("the data differ", {**prepared.train.identity, "numbers": prepared.content})
    return prepared


def _prepared(config: TrainConfig, data: RecipeData, num_devices: int, checkpoint: Checkpoint | None) -> TrainingData:
    if config.data.repo_id == recipe_data.FAKE_REPO_ID:
        return TrainingData(data.config, _loader(config, data), holdout=None, contract=None)
    data = with_usable_statistics(config, data, checkpoint)
    contract = check_samples(config, data)
    data_config, dataset = data.members[0]
    # Only who writes it; a stream has no episodes.
    if contract is not None and processes.is_first() and isinstance(dataset, LeRobotDataset):
        numbers = seen.trained_on(config, data_config, dataset)
        contract = dataclasses.replace(contract, seen=seen.look(config, data_config, dataset, numbers))
    return TrainingData(
        data.config,
        train=_loader(config, data),
        holdout=_open_holdout(config, data, num_devices),
        contract=contract,
        action_names=() if contract is None else _action_names(data_config, dataset, contract),
        content=recipe_data.content_of(data),
        held=_held(config, data),
    )


def _held(config: TrainConfig, data: RecipeData) -> tuple[tuple[int, list[int]], ...]:
    return tuple(
        (
            len(dataset.metadata.episodes),
            holdout.split_dataset(config, member, dataset)[1] if holdout.holds_out(config, member) else [],
        )
        for member, dataset in data.members
        if isinstance(dataset, LeRobotDataset)
    )


def _loader(config: TrainConfig, data: RecipeData, **options: Any) -> SourceLoader:
    """Of this process's rows of every batch."""
    part = (processes.index(), processes.count())
    return data_loader.create_batch_loader(config, data=data, part=part, **options)


def with_usable_statistics(config: TrainConfig, data: RecipeData, checkpoint: Checkpoint | None = None) -> RecipeData:
    """Checks the statistics against a sample as it is when it is normalised; see `stats_in_use.usable`.

    Raises:
        ValueError: the statistics cannot be used; or a transform fails.
    """
    folders = stats_in_use.folders_of(config, data.config)
    found = [
        stats_in_use.usable(
            member, folder, _stats_widths(member, dataset), checkpoint, padded_width=config.model.action_dim
        )
        for (member, dataset), folder in zip(data.members, folders, strict=True)
    ]
    return data.with_stats(found)


def _stats_widths(data_config: DataConfig, dataset: Dataset | Stream) -> dict[str, int]:
    """Of `state` and `actions` of a sample when it is normalised."""
    chain = data_loader.input_transforms(data_config, dataset, skip_norm_stats=True)
    before = tuple(itertools.takewhile(lambda step: not isinstance(step, transforms.Normalize), chain))
    where, sample = recipe_data.samples_of(dataset, 1)[0]
    raw = _run_chain(sample, before, data_config, where=where)[2]
    return {key: np.shape(raw[key])[-1] for key in ("state", "actions") if np.ndim(raw.get(key, 0))}


def check_samples(config: TrainConfig, data: RecipeData) -> Contract | None:
    """Runs samples from all over the dataset through the recipe; returns what a policy trained on it will expect, None
    where its output transforms do not say what it gives.

    Raises:
        ValueError: a transform fails, or its result is not what the model takes; the transform is named.
    """
    data_config, dataset = data.members[0]
    _check_action_tokenizer(config, data_config)
    chain = data_loader.input_transforms(data_config, dataset)
    clients, raws, mades = [], [], []
    look = FirstLook(config, data_config)
    for where, sample in recipe_data.samples_of(dataset, _NUM_SAMPLES_CHECKED):
        client, raw, made = _run_chain(sample, chain, data_config, where=where, look=look)
        _check_model_inputs(config, data_config, made)
        mades.append(made)
        clients.append(client)
        raws.append(raw)
    contract, returned = None, _returned_actions(data_config, config, raws[0])
    if returned is not None:
        contract = _contract(data_config, dataset, config, clients, returned.shape[-1])
        _check_contract(contract, data_config, clients[0], raws, returned)
        contract = with_recorded_limits(contract, dataset, data_config, clients[0], returned)
        for member, each in data.members:
            check_names(contract, each, member)
    for client, made in zip(clients, mades, strict=True):
        look.round_trip(client, made)
    look.warn()
    if processes.is_first():
        dataset_look.warn_of_findings(dataset, data_config, config.model.action_horizon)
    for member, mixed_in in data.members[1:]:
        _check_mixed_in(config, member, mixed_in, mades[0])
        _warn_of_another_rate(config, _rate_of(dataset), member, mixed_in)
    return contract


def _check_mixed_in(
    config: TrainConfig, data_config: DataConfig, dataset: Dataset | Stream, made_of_first: Tree
) -> None:
    """Raises ValueError unless samples of another dataset of a mixture can be in one batch with those of the first."""
    chain = data_loader.input_transforms(data_config, dataset)
    look = FirstLook(config, data_config)
    for where, sample in recipe_data.samples_of(dataset, _NUM_SAMPLES_CHECKED):
        client, _, made = _run_chain(sample, chain, data_config, where=where, look=look)
        _check_model_inputs(config, data_config, made)
        look.round_trip(client, made)
        first, found = flatten(dict(made_of_first)), flatten(made)
        others = first.keys() ^ found.keys()
        others |= {key for key in first.keys() & found.keys() if np.shape(first[key]) != np.shape(found[key])}
        if others:
            raise ValueError(
                f"the samples of {data_config.dataset_name} are not like those of the first dataset of the mixture in "
                f"{sorted(others)}: {_described(made)}; the first has {_described(made_of_first)}. Make them alike in "
                "the transforms of the part"
            )
    look.warn()
    if processes.is_first():
        dataset_look.warn_of_findings(dataset, data_config, config.model.action_horizon)


def _warn_of_another_rate(
    config: TrainConfig, served: float | None, data_config: DataConfig, dataset: Dataset | Stream
) -> None:
    """Of a mixture, whose robot gets all chunks at the rate of the first dataset."""
    rate = _rate_of(dataset)
    if not rate or not served or rate == served:
        return
    steps = config.model.action_horizon
    logger.warning(
        "%s was recorded at %g Hz, and a checkpoint of the mixture serves at the %g Hz of its first dataset: what took "
        "%.2g s there is taught as a motion of %.2g s. Record or convert both at one rate, unless each has a robot and "
        "tasks of its own",
        data_config.dataset_name,
        rate,
        served,
        steps / rate,
        steps / served,
    )


def _check_action_tokenizer(config: TrainConfig, data_config: DataConfig) -> None:
    """Raises ValueError unless a model that writes its actions can write every one of them."""
    for step in data_config.model_transforms.inputs:
        if isinstance(step, transforms.TokenizeFASTInputs) and isinstance(step.tokenizer, FASTTokenizer):
            model: Any = config.model
            step.tokenizer.check_fits(model.expert.vocab_size)


def _run_chain(
    sample: Sample,
    chain: Sequence[DataTransformFn],
    data_config: DataConfig,
    *,
    where: str,
    look: FirstLook | None = None,
) -> tuple[Sample, Sample, Sample]:
    """The sample under client keys, before normalisation, and as the model takes it."""
    behind = (*data_config.data_transforms.inputs, transforms.Normalize, *data_config.model_transforms.inputs)
    num_client = len(chain) - len(behind)
    client = raw = sample
    if look is not None:
        look.stage(None, sample)
    for i, transform in enumerate(chain):
        if isinstance(transform, transforms.Normalize):
            raw = sample
        before = sample
        try:
            sample = transform(before)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise ValueError(
                f"{where} of {data_config.dataset_name} does not pass {type(transform).__name__} (step {i + 1} of "
                f"{len(chain)}): {error}\nThe step was given: {_described(before)}"
            ) from error
        if look is not None:
            look.stage(before, sample, transform)
        if i + 1 == num_client:
            client = sample
    return client, raw, sample


def _described(sample: Tree) -> str:
    return ", ".join(
        f"{key} {np.asarray(value).dtype}{list(np.shape(value))}" for key, value in flatten(sample).items()
    )


def _check_model_inputs(config: TrainConfig, data_config: DataConfig, made: Mapping[str, object]) -> None:
    """Raises ValueError, naming every difference, unless the sample has the shapes of the model's inputs."""
    found = flatten(made)
    problems = [
        f"{key}: {_shape_text(found.get(key))}, the model takes {list(spec.shape)}"
        for key, spec in config.model.sample_spec().items()
        if key not in found or np.shape(found[key]) != spec.shape
    ]
    is_fast = config.model.model_type is ModelType.PI0_FAST
    problems = [] if is_fast and "actions" in found else problems  # takes any cameras, and the robot's own widths
    if problems:
        raise ValueError(
            f"the samples of {data_config.dataset_name} do not fit the model of recipe '{config.name}': "
            f"{'; '.join(problems)}. Found: {', '.join(found)}. Correct model.action_dim, model.image_keys, or the "
            "data transforms"
        )


def _returned_actions(data_config: DataConfig, config: TrainConfig, raw: Sample) -> np.ndarray | None:
    """[h, width]: a sample's actions, as the robot would get them back; None where that cannot be told.

    Output transforms of a user's own may answer in any form, and need what only the robot's machine has.
    """
    actions = np.asarray(raw["actions"])
    padding = max(0, config.model.action_dim - actions.shape[-1])
    padded = np.pad(actions, [(0, 0)] * (actions.ndim - 1) + [(0, padding)])
    try:
        returned = transforms.compose(data_config.data_transforms.outputs)({"state": raw["state"], "actions": padded})
        found = np.asarray(returned["actions"])
        if found.ndim == 2 and found.dtype.kind in "fiub":
            return found
        problem = f"their 'actions' are of shape {list(found.shape)} and dtype {found.dtype}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    logger.warning(
        "the output transforms of recipe '%s' do not give 'actions' of [steps, dimensions] (%s). It trains all the "
        "same, but its checkpoints have no contract, so less of what robots send is checked, and validation has no "
        "errors of actions",
        config.name,
        problem,
    )
    return None


def _check_contract(
    contract: Contract, data_config: DataConfig, client: Sample, raws: Sequence[Sample], returned: np.ndarray
) -> None:
    """Raises ValueError unless the recipe's robot has the state and the actions of the dataset, and of its outputs.

    Args:
        client: a sample under client keys.
        raws: this one and others after the robot's transforms, not normalised.
        returned: see `_returned_actions`.
    """
    try:
        contract.check_vectors(client)
    except ValueError as error:
        raise ValueError(
            f"the samples of {data_config.dataset_name} are not what the recipe's robot sends: {error}"
        ) from error
    trained = np.concatenate([np.asarray(raw["actions"]).reshape(-1, np.shape(raw["actions"])[-1]) for raw in raws])
    sent = np.asarray(client.get("actions"))  # may be a map of parts, which the robot's transforms put together
    recorded = sent.shape[-1] if sent.ndim else trained.shape[-1]
    # The robot's transforms may train another form of action, leave a recorded dimension out, or pad with zeros.
    used = int(np.max(np.flatnonzero(trained.any(axis=0)), initial=-1)) + 1
    if contract.actions.width != recorded and not used <= contract.actions.width <= trained.shape[-1]:
        if find_spec(data_config.data_transforms.inputs) is not None:
            contract.check_actions(recorded, where=f"the actions of {data_config.dataset_name} have")
        logger.warning(
            "the actions of %s have %d dimensions, and robots are given %d. That is right where the output transforms "
            "make others of them; correct their width if they were copied from another robot's",
            data_config.dataset_name,
            recorded,
            contract.actions.width,
        )
    contract.check_actions(returned.shape[-1], where="the output transforms return")


def _shape_text(value: ArrayLike | None) -> str:
    return "missing" if value is None else f"shape {list(np.shape(value))}"


def _contract(
    data_config: DataConfig, dataset: Dataset | Stream, config: TrainConfig, clients: list[Sample], action_width: int
) -> Contract:
    features = _features(dataset)
    action_key = data_config.action_sequence_keys[0]
    state_key = next((key for key in ("observation.state", "state") if key in features), "")
    return Contract.build(
        data_config,
        config.model,
        sample=_read_by_robot(clients[0], data_config),
        action_width=action_width,
        control_hz=_rate_of(dataset),
        state_names=dimension_names(features.get(state_key) or {}),
        action_names=dimension_names(features.get(action_key) or {}),
        camera_means=channel_means(clients),
    )


def _read_by_robot(client: Sample, data_config: DataConfig) -> Sample:
    """A sample under client keys without what makes no difference to what the model observes: datasets have more than
    robots send. Of transforms with a spec, all of it: that says what they take.
    """
    if find_spec(data_config.data_transforms.inputs) is not None:
        return client
    to_model = transforms.compose(data_config.data_transforms.inputs)
    read, whole = client, flatten(to_model(_without(client, "")))
    for path in flatten(client):
        try:
            made = flatten(to_model(_without(client, path)))
        except Exception:  # the robot has to send it
            continue
        observed = [key for key in {**whole, **made} if key.partition("/")[0] != "actions"]
        if all(key in whole and key in made and np.array_equal(whole[key], made[key]) for key in observed):
            read = _without(read, path)
    return read


def _without(tree: Mapping[str, Any], path: str) -> Sample:
    """New dicts without the leaf at a '/'-joined path; keys may have slashes themselves."""
    return {
        key: _without(value, path.removeprefix(f"{key}/") if path.startswith(f"{key}/") else "")
        if isinstance(value, Mapping)
        else value
        for key, value in tree.items()
        if key != path
    }


def _rate_of(dataset: Dataset | Stream) -> float | None:
    """Frames per second."""
    return dataset.control_hz if isinstance(dataset, Stream) else cast(LeRobotDataset, dataset).metadata.fps


def _features(dataset: Dataset | Stream) -> Mapping[str, Feature]:
    """As LeRobot describes them; a stream names none."""
    return dataset.metadata.features if isinstance(dataset, LeRobotDataset) else {}


def _action_names(data_config: DataConfig, dataset: Dataset | Stream, contract: Contract) -> tuple[str, ...]:
    """The dataset's own names where they count as many dimensions as the robot takes."""
    names = dimension_names(_features(dataset).get(data_config.action_sequence_keys[0]) or {})
    return names if len(names) == contract.actions.width else tuple(contract.actions.names)


def _open_holdout(config: TrainConfig, data: RecipeData, num_devices: int) -> object | None:
    """At most one pass over the episodes held out, in batches that fit however few frames there are."""
    if not holdout.holds_out(config, data.config):
        return None
    shares = [part.share for part in data.config.mixture] or [1.0]
    held = [
        (share, *_held_out(config, member, dataset))
        for share, (member, dataset) in zip(shares, data.members, strict=True)
        if holdout.holds_out(config, member) and isinstance(dataset, LeRobotDataset)
    ]
    total_share = sum(share for share, _, _ in held)
    # Of a mixture: until the first of its parts has been passed through.
    num_episodes = sum(episodes for _, episodes, _ in held)
    num_frames = min(int(frames * total_share / share) for share, _, frames in held)
    batch_size = min(config.batch_size, num_frames // num_devices * num_devices)
    if batch_size == 0:
        found = (
            f"{num_episodes} episodes held out give {num_frames} frames, fewer than there are devices ({num_devices})"
        )
        if not config.resume:  # what was held out once stays out of training, on whatever machine
            raise ValueError(f"the {found}; hold out more")
        logger.warning("the %s: this run is not validated any more", found)
        return None
    small = dataclasses.replace(config, batch_size=batch_size, gradient_accumulation_steps=1)
    num_batches = min(config.eval_batches, num_frames // batch_size)
    logger.info("held out for validation: %d episodes, %d frames", num_episodes, num_frames)
    return _loader(small, data, split="val", num_batches=num_batches)


def _held_out(config: TrainConfig, data_config: DataConfig, dataset: LeRobotDataset) -> tuple[int, int]:
    """Numbers of episodes and of frames that a dataset holds out."""
    _, held = holdout.split_dataset(config, data_config, dataset)
    return len(held), holdout.num_frames(dataset, held)


def check_disk_space(config: TrainConfig, needed: int) -> None:
    """Two checkpoints have to fit for a moment: the new one is complete before the old one goes.

    Args:
        needed: bytes of one.
    Raises:
        OSError: they do not.
    """
    free = shutil.disk_usage(config.checkpoint_dir).free
    if config.overwrite:  # The old run goes when this one begins.
        free += run_directory.size(config.checkpoint_dir)
    if needed > free:
        raise OSError(
            f"a checkpoint takes up to {needed / 1e9:.1f} GB, and only {free / 1e9:.1f} GB are free in "
            f"{config.checkpoint_dir}; make room or choose another --checkpoint-base-dir"
        )
    if 2 * needed > free:
        logger.warning(
            "%.1f GB are free; two checkpoints may take %.1f GB while one replaces the other",
            free / 1e9,
            2 * needed / 1e9,
        )
