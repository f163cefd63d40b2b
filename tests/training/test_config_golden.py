"""Every registered recipe, field by field, against the recorded ones of the reference implementation."""

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

import pytest

from openpi.training.config import AssetsConfig, TrainConfig, config_names, get_config

# Where we differ on purpose.
INTENDED = {
    # Trackers are off unless asked for, and never prompt; the published flag `--no-wandb-enabled` still parses.
    "wandb_enabled": lambda expected: False,
}
SELECTION = {
    *("exclude_episodes", "exclude_findings", "exclude_kinds", "exclude_where"),
    "validation_episodes",
}
# Fields that the reference does not have; their defaults change nothing.
NEW_FIELDS = {
    "TrainConfig": {
        "gradient_accumulation_steps",
        "frames_per_pass",
        "keep_best",
        "holdout_episodes",
        "eval_interval",
        "eval_batches",
        "tensorboard_enabled",
        "backend",
        "pytorch_compile",
        "pytorch_free_gradients",
        "pytorch_frozen_bits",
        "cpu_devices",
        "note",
        "save_frozen_params",
    },
    "Pi0Config": {
        "image_encoder_variant",
        "image_resolution",
        "image_keys",
        "tokenizer_path",
        "augmentation",
        "remat",
        "skip_unused",
        "loss_draws",
        "rtc_max_delay",
    },
    "Pi0FASTConfig": {
        "action_tokenizer_path",
        "image_encoder_variant",
        "image_resolution",
        "image_keys",
        "tokenizer_path",
        "augmentation",
        "remat",
        "skip_unused",
    },
    "AdamW": {"state_bits"},
    "DataConfig": {*SELECTION, "local_files_only", "shuffle_buffer_size", "mixture"},
    "RLDSDroidDataConfig": {"shuffle_buffer_size"},
    "factory": {*SELECTION, "use_quantile_norm"},
}
REQUIRED = "<required>"


def _recorded(golden: Path) -> dict[str, Any]:
    documents = [json.loads((golden / "data" / name).read_text()) for name in ("configs.json", "configs_trossen.json")]
    return documents[0] | documents[1]


def test_every_published_recipe_is_registered(golden):
    assert set(_recorded(golden)) <= set(config_names())


def test_recipes_have_the_published_values(golden):
    problems = []
    for name, expected in _recorded(golden).items():
        problems += [f"{name}: {line}" for line in _differences(get_config(name), expected)]
    assert problems == []


def test_recipes_expand_to_the_published_transforms(golden):
    problems = []
    for name, expected in _recorded(golden).items():
        config = get_config(name)
        assets = Path("/nonexistent")
        data = dataclasses.replace(config.data, assets=dataclasses.replace(config.data.assets, assets_dir=None))
        if "error" in expected["data_config"]:  # the reference cannot build these; see the next test
            continue
        created = data.create(assets, config.model)
        problems += [f"{name}: {line}" for line in _data_config_differences(created, expected["data_config"])]
    assert problems == []


@pytest.mark.parametrize(
    "name",
    [
        "paligemma_binning_droid",
        "paligemma_fast_droid",
        "paligemma_fast_specialist_droid",
        "paligemma_vq_droid",
        "paligemma_diffusion_droid",
    ],
)
def test_roboarena_recipes_build_although_the_reference_does_not(name):
    config = get_config(name)
    data = config.data.create(Path("/nonexistent"), config.model)
    assert [type(t).__name__ for t in data.data_transforms.inputs] == ["DroidInputs"]
    assert data.prompt_from_task
    assert data.asset_id == "droid"
    assert data.use_quantile_norm == (name != "paligemma_diffusion_droid")


def test_statistics_can_be_normalised_the_other_way_on_request():
    data = dataclasses.replace(get_config("pi05_libero").data, use_quantile_norm=False)
    assert not data.create(Path("/nonexistent"), get_config("pi05_libero").model).use_quantile_norm


@pytest.mark.parametrize(
    ("repo_id", "expected"),
    [("me/mine", "me/mine"), ("/data/mine", "mine"), ("./mine/", "mine"), ("~/sets/mine", "mine")],
)
def test_statistics_of_a_dataset_in_a_folder_are_named_after_the_folder(repo_id, expected):
    data = dataclasses.replace(get_config("pi0_libero").data, repo_id=repo_id)
    assert data.asset_id == expected
    assert data.stats_dir("/assets") == f"/assets/{expected}"


def test_an_asset_id_that_leads_out_of_its_folder_is_refused():
    for asset_id in ("/etc", "../other"):
        with pytest.raises(ValueError, match="leads out of the assets folder"):
            AssetsConfig(asset_id=asset_id)


def test_corrected_trossen_recipes_train_adapters():
    published, corrected = (
        get_config("pi05_trossen_transfer_block"),
        get_config("pi05_trossen_transfer_block_lora"),
    )
    path = "PaliGemma/llm/layers/attn/q_einsum/lora_a"
    assert not corrected.freeze_filter(path)
    assert corrected.freeze_filter("PaliGemma/llm/layers/attn/q_einsum/w")
    assert corrected.model.paligemma_variant == "gemma_2b_lora"
    assert published.model.paligemma_variant == "gemma_2b"


def _differences(config: TrainConfig, expected: dict[str, Any]) -> list[str]:
    lines = []
    for key, value in expected.items():
        if key in ("__class__", "data_config", "data", "freeze_filter"):
            continue
        if key == "model_type":
            lines += _compare(key, config.model.model_type.value, value)
            continue
        value = INTENDED[key](value) if key in INTENDED else value
        lines += _compare(key, getattr(config, key), value)
    lines += _compare("data", config.data, expected["data"], factory=True)
    lines += _freeze_differences(config, expected["freeze_filter"])
    extra = {f.name for f in dataclasses.fields(config)} - expected.keys() - NEW_FIELDS["TrainConfig"]
    return lines + [f"unexpected field {name}" for name in sorted(extra)]


def _freeze_differences(config: TrainConfig, expected: str) -> list[str]:
    """The recorded filter is text, so filters are compared by what they do."""
    paths = {
        "PaliGemma/llm/layers/attn/q_einsum/w": True,
        "PaliGemma/llm/layers/attn/q_einsum_1/w": True,
        "PaliGemma/llm/layers/mlp_1/linear_lora_a": False,
        "PaliGemma/img/embedding/kernel": False,
        "action_in_proj/kernel": False,
    }
    freezes = expected != "nothing frozen"
    return [
        f"freeze_filter of {path}"
        for path, if_lora in paths.items()
        if config.freeze_filter(path) != (if_lora and freezes)
    ]


def _compare(path: str, found: Any, expected: Any, *, factory: bool = False) -> list[str]:
    if expected == REQUIRED:
        return [] if not found else [f"{path} should be left open, is {found!r}"]
    if expected == "<callable>":
        return [] if callable(found) else [f"{path} is not callable"]
    if isinstance(expected, dict) and "__class__" in expected:
        return _compare_struct(path, found, expected, factory=factory)
    if isinstance(expected, dict):
        found = dict(found)
        return [line for key in expected for line in _compare(f"{path}.{key}", found.get(key), expected[key])]
    if isinstance(expected, list):
        if len(found) != len(expected):
            return [f"{path} has {len(found)} entries, expected {len(expected)}"]
        return [
            line
            for i, (f, e) in enumerate(zip(found, expected, strict=True))
            for line in _compare(f"{path}[{i}]", f, e)
        ]
    expected = expected.rstrip("/") if isinstance(expected, str) else expected
    return [] if _text(found) == expected else [f"{path} is {found!r}, expected {expected!r}"]


def _compare_struct(path: str, found: Any, expected: dict[str, Any], *, factory: bool) -> list[str]:
    lines = _compare(f"{path}.class", type(found).__name__, expected["__class__"])
    for key, value in expected.items():
        if key == "__class__":
            continue
        if key == "filter_dict_path" and value is None and not hasattr(found, key):
            continue  # of the older fork; now a field of each dataset of a mixture
        if not hasattr(found, key):
            lines.append(f"{path}.{key} is missing")
            continue
        lines += _compare(f"{path}.{key}", getattr(found, key), value)
    if dataclasses.is_dataclass(found):
        new = NEW_FIELDS.get(type(found).__name__, set()) | (NEW_FIELDS["factory"] if factory else set())
        extra = {f.name for f in dataclasses.fields(found)} - expected.keys() - new
        if type(found).__name__ in ("Pi0Config", "DataConfig"):
            extra -= {"pytorch_compile_mode", "datasets"}  # absent in the recording of the older fork
        lines += [f"{path}.{name} is unexpected" for name in sorted(extra)]
    return lines


def _text(value: Any) -> Any:
    """As the recordings write it; a '/' at the end of a folder means nothing."""
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, type):
        return value.__name__
    return value


def _data_config_differences(found: Any, expected: dict[str, Any]) -> list[str]:
    lines = []
    for key, value in expected.items():
        if key.endswith("_transforms"):
            for side in ("inputs", "outputs"):
                lines += _transform_differences(f"{key}.{side}", getattr(getattr(found, key), side), value[side])
        else:
            lines += _compare(key, getattr(found, key), value)
    return lines


def _transform_differences(path: str, found: Any, expected: list[dict[str, Any]]) -> list[str]:
    names, wanted = [type(t).__name__ for t in found], [t["__class__"] for t in expected]
    if names != wanted:
        return [f"{path} is {names}, expected {wanted}"]
    lines = []
    for transform, fields in zip(found, expected, strict=True):
        for key, value in fields.items():
            where = f"{path}.{type(transform).__name__}.{key}"
            if key == "__class__":
                continue
            if key == "tokenizer":
                lines += _compare(where, f"<{type(transform.tokenizer).__name__}>", value)
            else:
                lines += _compare(where, getattr(transform, key), value)
    return lines
