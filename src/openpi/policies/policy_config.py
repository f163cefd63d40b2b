"""From a checkpoint folder to a policy."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from openpi import transforms as _transforms
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.models.rtc_config import DEFAULT_RTC, RtcConfig
from openpi.models_pytorch.fp8_file import Calibration
from openpi.policies import data_half, lerobot_robot
from openpi.policies.continuation import Continuation
from openpi.policies.contract import Contract
from openpi.policies.data_half import DataFactory, DataHalf, Recipe
from openpi.policies.fp8 import check_model
from openpi.policies.guards import ContractGuard, InputsGuard, RangeGuard
from openpi.policies.hold import hold_transforms
from openpi.policies.policy import Policy, Sampler
from openpi.policies.robot_spec import find_spec
from openpi.shared import download, frameworks, stats_check
from openpi.shared.frameworks import Backend
from openpi.shared.normalize import NormStats
from openpi.shared.tree import flatten
from openpi.weights import checksums, layout
from openpi.weights.layout import Layout

if TYPE_CHECKING:
    from openpi.models.model_config import BaseModelConfig


logger = logging.getLogger(__name__)


def create_trained_policy(
    train_config: Recipe,
    checkpoint_dir: Path | str | Checkpoint,
    *,
    repack_transforms: _transforms.Group | None = None,
    sample_kwargs: Mapping[str, object] | None = None,
    default_prompt: str | None = None,
    norm_stats: Mapping[str, NormStats] | None = None,
    pytorch_device: str | None = None,
    backend: Backend | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    on_undecodable: Literal["error", "hold"] = "error",
    rtc: RtcConfig | None = DEFAULT_RTC,
    fp8: bool = False,
) -> Policy:
    """A policy from a checkpoint of training, or a released one.

    Everything but the recipe comes from the checkpoint: weights, statistics, tokenizer, contract.

    Args:
        train_config: the recipe, with the fields of `TrainConfig`.
        checkpoint_dir: folder with `params/` or `model.safetensors`, and `assets/`, local or remote; see
            `docs/reference/checkpoints.md`. Or the checkpoint, open.
        repack_transforms: applied before and after everything else, to adapt a client's keys.
        sample_kwargs: passed to the model with every call, such as `num_steps`. pi0-FAST is held to the grammar of
            its tokenizer unless `grammar` is among them.
        default_prompt: for observations without one; wins over the recipe's.
        norm_stats: used instead of the checkpoint's.
        pytorch_device: such as `cuda:1` or `cpu`; implies the PyTorch backend. None = a GPU if there is one.
        backend: what runs the model; either runs every layout. None = PyTorch for `model.safetensors`, else JAX; where
            only one is installed, that.
        on_undecodable: what to answer when pi0-FAST wrote no action chunk: an error, or actions that stand still.
        rtc: how chunks go on from what a robot is still playing, with models that can; None = not at all.
        dtype: of the parameters; None = bfloat16, or float32 if the recipe's model computes in it.
        fp8: make products in FP8 as the checkpoint was calibrated; implies the PyTorch backend.
    Raises:
        FileNotFoundError, ConnectionError: no checkpoint, no statistics in it, or no tokenizer; with `fp8`, no
            calibration.
        ValueError: the recipe names no asset id, statistics of another robot, or another model than the checkpoint
            holds; its action tokenizer cannot decode; `rtc` is not what it was trained for; or there is no such
            device.
        ImportError: the backend is not installed, or none is.
    """
    _check_actions_can_be_decoded(train_config.model)
    backend = "pytorch" if backend is None and (fp8 or pytorch_device is not None) else backend
    _check_backend(backend, pytorch_device)
    if fp8:
        _check_fp8(train_config.model, backend, pytorch_device, dtype)
    is_open = isinstance(checkpoint_dir, Checkpoint)
    checkpoint = checkpoint_dir if is_open else Checkpoint(download.maybe_download(checkpoint_dir))
    backend = backend or _backend_of(checkpoint)
    calibration = checkpoint.read(Calibration.load) if fp8 else None
    _warn_of_other_horizon(train_config.model, checkpoint.folder)
    pipeline = load_pipeline(
        train_config,
        checkpoint,
        repack_transforms=repack_transforms,
        default_prompt=default_prompt,
        norm_stats=norm_stats,
    )
    continuation = _continuation(rtc, train_config.model, pipeline)
    repack = repack_transforms or _transforms.Group()
    _open_tokenizers(pipeline)
    sample_kwargs = _with_grammar(pipeline, sample_kwargs)
    return Policy(
        _load_sampler(train_config.model, checkpoint, backend, pytorch_device, dtype, calibration),
        transforms=pipeline.inputs,
        output_transforms=pipeline.outputs,
        sample_kwargs=sample_kwargs,
        metadata=getattr(train_config, "policy_metadata", None),  # which copies of the first version lack
        contract=pipeline.contract,
        checkpoint=checkpoint.identity,
        hold_transforms=[*hold_transforms(pipeline.data_config, train_config.model.action_horizon), *repack.outputs]
        if on_undecodable == "hold" and _writes_tokens(pipeline)
        else None,
        continuation=continuation,
    )


def _check_actions_can_be_decoded(model_config: BaseModelConfig) -> None:
    """Before weights are fetched or read."""
    check = getattr(getattr(model_config, "fast_model_tokenizer", None), "check_can_decode", None)
    if check is not None:
        check()


def _check_backend(backend: Backend | None, pytorch_device: str | None) -> None:
    """Before weights are fetched or read."""
    if backend == "jax" and pytorch_device is not None:
        raise ValueError(f"pytorch_device={pytorch_device} goes with backend=pytorch; backend is jax. Leave one out")
    if backend is None:
        frameworks.choose("jax", "a policy")
        return
    frameworks.require_backend(backend)
    if backend == "pytorch":
        from openpi.policies.sampler_pytorch import resolve_device

        resolve_device(pytorch_device)


def _check_fp8(
    model_config: BaseModelConfig, backend: Backend | None, pytorch_device: str | None, dtype: str | None
) -> None:
    """Before weights are fetched or read."""
    if backend == "jax":
        raise ValueError("fp8 goes with backend=pytorch; backend is jax. Leave one out")
    check_model(model_config, dtype)
    from openpi.models_pytorch.fp8 import check_device
    from openpi.policies.sampler_pytorch import resolve_device

    check_device(resolve_device(pytorch_device))


def _backend_of(checkpoint: Checkpoint) -> Backend:
    """The layout's own framework, or the one that is installed."""
    own: Backend = "jax" if checkpoint.layout is Layout.JAX else "pytorch"
    backend = frameworks.choose(own, "a policy")
    if backend != own:
        logger.info("%s is not installed; %s runs the model", frameworks.NAMES[own], frameworks.NAMES[backend])
    return backend


def _warn_of_other_horizon(model_config: BaseModelConfig, folder: Path) -> None:
    """Shapes of weights do not tell how many actions a chunk has."""
    stored = layout.read_config(folder)
    horizon = stored.get("action_horizon", stored.get("chunk_size"))
    if horizon is not None and horizon != model_config.action_horizon:
        logger.warning(
            "the recipe's action_horizon is %s, and %s says %s: the model was trained on chunks of that length",
            model_config.action_horizon,
            folder / layout.CONFIG_FILE,
            horizon,
        )


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What a policy does around its model.

    Attributes:
        inputs: observation -> un-batched model inputs.
        outputs: `{"state", "actions"}` as the model has them -> what the robot gets.
        data_config: the recipe's, with the statistics in use.
        contract: of the checkpoint, or else what the recipe promises, if it says which robot it is for.
    """

    inputs: Sequence[_transforms.DataTransformFn]
    outputs: Sequence[_transforms.DataTransformFn]
    data_config: Any
    contract: Contract | None = None


def load_pipeline(
    train_config: Recipe,
    checkpoint: Checkpoint,
    *,
    repack_transforms: _transforms.Group | None = None,
    default_prompt: str | None = None,
    norm_stats: Mapping[str, NormStats] | None = None,
) -> Pipeline:
    """The pipeline of a checkpoint; arguments and errors as of `create_trained_policy`."""
    checksums.check_small_files(checkpoint.folder)
    data_config = data_config_of(train_config, checkpoint)
    if norm_stats is None:
        norm_stats = norm_stats_of(checkpoint, data_config)
    check_norm_stats(norm_stats, data_config, checkpoint.folder)
    data_config = dataclasses.replace(data_config, norm_stats=norm_stats)
    recorded = _contract_of(checkpoint, data_config, train_config.model)
    contract = recorded or _described(data_config, train_config.model)
    if contract is not None and default_prompt is not None:
        contract = dataclasses.replace(contract, default_prompt=default_prompt)
    checked = None if recorded is None else contract
    made = make_pipeline(data_config, checked, default_prompt=default_prompt, repack_transforms=repack_transforms)
    return dataclasses.replace(made, contract=contract)


def data_config_of(train_config: Recipe, checkpoint: Checkpoint) -> DataHalf:
    """The recipe's data half, expanded with what the checkpoint brings, its tokenizers; statistics are not read.

    Raises:
        ValueError: a LeRobot policy's actions are relative to the state in other dimensions than the recipe's.
    """
    model = _with_own_tokenizers(train_config.model, checkpoint.tokenizers)
    data = _with_own_assets(train_config.data, checkpoint.assets)
    data_config = data_half.expanded(data, checkpoint.assets, model, None)
    lerobot_robot.check_relative(checkpoint.folder, data_config)
    return data_config


def _with_own_tokenizers(model: BaseModelConfig, tokenizers: Mapping[str, Path]) -> BaseModelConfig:
    """The model's config, with the tokenizers that the checkpoint was trained with."""
    own: dict[str, Any] = {field: str(path) for field, path in tokenizers.items() if hasattr(model, field)}
    kwargs = getattr(model, "fast_model_tokenizer_kwargs", None)
    if kwargs:  # what they name is where the checkpoint's own came from
        known = {"tokenizer_path": "model_path", "action_tokenizer_path": "fast_tokenizer_path"}
        replaced = {known[field] for field in own}
        own["fast_model_tokenizer_kwargs"] = {key: v for key, v in kwargs.items() if key not in replaced}
    return dataclasses.replace(model, **own)


def _with_own_assets(data: Any, assets: Path) -> DataFactory[DataHalf]:
    """For a `create` of the user's own that reads statistics: those that the recipe names may be far away."""
    if not hasattr(data, "assets"):
        return data
    return dataclasses.replace(data, assets=dataclasses.replace(data.assets, assets_dir=str(assets)))


def norm_stats_of(checkpoint: Checkpoint, data_config: DataHalf) -> dict[str, NormStats]:
    """The statistics that a checkpoint is served with.

    Raises:
        ValueError: the recipe names no asset id, or the statistics are of another kind.
        FileNotFoundError: there are none.
    """
    if data_config.asset_id is None:
        raise ValueError(
            "the recipe names no asset id, so there is no telling which of the checkpoint's statistics to "
            "use; set data.assets.asset_id, or pass norm_stats"
        )
    return checkpoint.norm_stats(data_config.asset_id, use_quantiles=data_config.use_quantile_norm)


def check_norm_stats(norm_stats: Mapping[str, NormStats], data_config: DataHalf, folder: Path | str) -> None:
    """Refuses statistics that cannot be used, and warns of ranges without width: the model was trained with them.

    Raises:
        ValueError: see `stats_check.find_problems`.
    """
    dims = stats_dims(data_config)
    use_quantiles = data_config.use_quantile_norm
    stats_check.check(norm_stats, source=str(folder), use_quantiles=use_quantiles, dims=dims)
    for key, which in stats_check.flat(norm_stats, use_quantiles=use_quantiles, dims=dims).items():
        logger.warning(
            "the statistics of %s have no width: small changes become huge. Train with `openpi stats` computed anew",
            dims.labels(key, which),
        )


def stats_dims(data_config: DataHalf) -> stats_check.Dims:
    """Names of the dimensions of `state` and `actions`, where the robot's transforms say them."""
    spec = find_spec(data_config.data_transforms.inputs)
    return stats_check.Dims(names={} if spec is None else spec.names)


def _contract_of(checkpoint: Checkpoint, data_config: DataHalf, model_config: BaseModelConfig) -> Contract | None:
    """The checkpoint's contract; refuses statistics of another robot, and says where the recipe differs."""
    contract = checkpoint.read(Contract.find)
    if contract is None:
        return None
    contract.check_norm_stats(data_config.norm_stats or {})
    if find_spec(data_config.data_transforms.inputs) is not None:
        state = {vector.key: np.zeros(vector.width) for vector in contract.state}
        served = Contract.build(
            data_config,
            model_config,
            sample=state,
            state_names=contract.state_names,
            control_hz=contract.control_hz,
        )
        for difference in contract.diff(served):
            logger.warning("this recipe differs from the one the checkpoint was trained with: %s", difference)
    return contract


def _described(data_config: DataHalf, model_config: BaseModelConfig) -> Contract | None:
    """What a recipe promises of a checkpoint that has no contract, as published: told to robots, and nothing that
    published programs send is refused by it. None where its transforms do not say which robot they are for.

    Raises:
        ValueError: statistics that are narrower than the robot: its last joints would get numbers without a unit.
    """
    spec = find_spec(data_config.data_transforms.inputs)
    if spec is None:
        return None
    sample = None
    for key, names in spec.names.items():
        stats = (data_config.norm_stats or {}).get(key)
        if stats is not None and stats.width < len(names):
            if key == "state" and spec.takes_any_state:
                sample = {spec.state[0].key: np.zeros(stats.width)}
                continue
            raise ValueError(
                f"the statistics of '{key}' ('{data_config.asset_id}') have {stats.width} dimensions; robot "
                f"'{spec.robot}' of the recipe has {len(names)}: {', '.join(names)}. They are those of another robot: "
                "correct asset_id, or name the recipe that the checkpoint was trained with"
            )
    return Contract.build(data_config, model_config, sample=sample)


def make_pipeline(
    data_config: DataHalf,
    contract: Contract | None = None,
    *,
    default_prompt: str | None = None,
    repack_transforms: _transforms.Group | None = None,
) -> Pipeline:
    """Input and output transforms in the order of the training specification, section 3."""
    repack = repack_transforms or _transforms.Group()
    norm_stats, quantiles = data_config.norm_stats, data_config.use_quantile_norm
    check_observation = [] if contract is None else [ContractGuard(contract)]
    names = stats_dims(data_config).names.get("state", ())
    check_state = InputsGuard((norm_stats or {}).get("state"), names) if contract is None else RangeGuard(contract)
    inputs = [
        *repack.inputs,
        *check_observation,
        _transforms.InjectDefaultPrompt(default_prompt),
        *data_config.data_transforms.inputs,
        check_state,
        _transforms.Normalize(norm_stats, use_quantiles=quantiles),
        *data_config.model_transforms.inputs,
    ]
    outputs = [
        *data_config.model_transforms.outputs,
        _transforms.Unnormalize(norm_stats, use_quantiles=quantiles),
        *data_config.data_transforms.outputs,
        *repack.outputs,
    ]
    return Pipeline(inputs, outputs, data_config, contract)


def _continuation(rtc: RtcConfig | None, model_config: BaseModelConfig, pipeline: Pipeline) -> Continuation | None:
    """Before weights are read."""
    if rtc is None:
        return None
    why_not = _why_no_continuation(pipeline)
    if not why_not:
        return Continuation.create(rtc, model_config, pipeline.inputs, pipeline.contract)
    if rtc.mode is not None:
        raise ValueError(f"real-time chunking of the mode '{rtc.mode}' is asked of {why_not}; leave it out")
    return None


def _why_no_continuation(pipeline: Pipeline) -> str:
    """Why chunks cannot go on from others; '' = they can."""
    if _writes_tokens(pipeline):
        return "pi0-FAST, which writes its actions token by token and cannot go on from others"
    if any(isinstance(transform, _transforms.SubsampleActions) for transform in pipeline.outputs):
        return "a recipe that leaves out rows of its chunks (SubsampleActions), which are missing where others go on"
    return ""


def _open_tokenizers(pipeline: Pipeline) -> None:
    """Before weights are read, which may take minutes: the file may be missing, and not within reach."""
    for step in pipeline.inputs:
        if isinstance(step, _transforms.TokenizePrompt):
            getattr(step.tokenizer, "open", lambda: None)()  # a user's own need not have it


def _with_grammar(pipeline: Pipeline, sample_kwargs: Mapping[str, object] | None) -> Mapping[str, object]:
    """A model that writes its actions may only write what can be read; `grammar=None` lets it write anything."""
    grammar = _transforms.action_grammar(pipeline.outputs)
    if sample_kwargs and "num_steps" in sample_kwargs and _writes_tokens(pipeline):
        raise ValueError("num_steps is given, but pi0-FAST writes its actions token by token; leave it out")
    return {**({} if grammar is None else {"grammar": grammar}), **(sample_kwargs or {})}


def _writes_tokens(pipeline: Pipeline) -> bool:
    return any(isinstance(step, _transforms.ExtractFASTActions) for step in pipeline.outputs)


def _load_sampler(
    model_config: BaseModelConfig,
    checkpoint: Checkpoint,
    backend: Backend,
    pytorch_device: str | None,
    dtype: Literal["float32", "bfloat16"] | None,
    calibration: Calibration | None = None,
) -> Sampler:
    """Imports the framework, which nothing else here needs. In JAX, adapters share the weights of a base that is loaded
    already.
    """
    if dtype is None:
        dtype = "float32" if getattr(model_config, "dtype", None) == "float32" else "bfloat16"
    if backend == "pytorch":
        from openpi.models_pytorch.loading import load_checkpoint
        from openpi.policies.sampler_pytorch import PytorchSampler, resolve_device

        device = resolve_device(pytorch_device)
        model = load_checkpoint(model_config, checkpoint.weights(model_config), device=device, dtype=dtype)
        compile_mode = getattr(model_config, "pytorch_compile_mode", None) if device.type == "cuda" else None
        return PytorchSampler(model, device=str(device), compile_mode=compile_mode, calibration=calibration)
    from openpi.policies.sampler_jax import JaxSampler
    from openpi.weights import on_device

    shapes = {path: leaf.shape for path, leaf in flatten(model_config.abstract_params()).items()}
    return JaxSampler(model_config.load(on_device.read_params(checkpoint.weights_of(shapes), dtype=dtype)))
