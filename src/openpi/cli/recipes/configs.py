"""`openpi configs [NAME_OR_TEXT]`: the registered recipes as a table, those that a text occurs in, or one in detail.

Memory classes are the figures published with the models, not measured here: serving takes 8 GB or more of GPU memory,
LoRA 23, full fine-tuning 70 in all at the default batch size. The small models run anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from openpi.cli.console import command, make_parser

if TYPE_CHECKING:
    from openpi.training.config import TrainConfig
    from openpi.training.data_config import DataConfig

COLUMNS = ("recipe", "robot", "model", "tunes", "memory", "dataset", "weights")
_FOOTNOTE = "memory: figures published with the models, not measured here; `openpi configs NAME` shows one recipe"
_SMALL_WIDTH = 512
_LINE_WIDTH = 100
# One of each language model: what a recipe freezes, it freezes in whole.
_LANGUAGE_MODEL_PATHS = ("PaliGemma/llm/layers/attn/q_einsum/w", "PaliGemma/llm/layers/attn/q_einsum_1/w")


@command("openpi configs")
def main(argv: list[str] | None = None) -> int:
    from openpi.training.config import config_names, get_config

    args = _parser().parse_args(argv)
    is_one = args.text in config_names() or ":" in args.text or args.text.endswith(".py")
    if is_one and not args.json:
        print(details(get_config(args.text)))
        return 0
    rows = [_row(get_config(args.text))] if is_one else _rows_with(args.text)
    if args.json:
        print(json.dumps(rows, indent=2))
    elif rows:
        print(_as_table(rows))
    else:
        print(f"openpi configs: no recipe with '{args.text}' in its row; `openpi configs` lists all", file=sys.stderr)
    return 0 if rows or args.json else 1


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi configs", __doc__)
    parser.add_argument(
        "text",
        nargs="?",
        default="",
        help="a recipe (a registered name, path/to/file.py:attribute or package.module:attribute) to show in detail, "
        "or a text that occurs in the rows to show",
    )
    parser.add_argument("--json", action="store_true", help="one object per recipe")
    return parser


def table() -> list[dict[str, str]]:
    """One row per registered recipe, by `COLUMNS`."""
    from openpi.training.config import config_names, get_config

    return [_row(get_config(name)) for name in config_names()]


def details(config: TrainConfig) -> str:
    """The row of a recipe, what it reads and what a robot sends, its numbers, and its note."""
    data = _data_config(config)
    model, schedule = config.model, config.lr_schedule
    facts = {
        **_row(config),
        "reads": ", ".join(_features_read(data)) or "-",
        "robot sends": ", ".join(_client_keys(data)) or "-",
        "statistics": config.data.stats_dir(config.assets_dirs) or "-",
        "chunk": f"{model.action_horizon} steps, {model.action_dim} wide; prompts of {model.max_token_len} tokens",
    }
    if _trains(config):
        averaged = f", averaged at {config.ema_decay}" if config.ema_decay is not None else ", no averaging"
        facts["steps"] = f"{config.num_train_steps:,} of {config.batch_size} samples{averaged}"
        facts["learning rate"] = f"{type(schedule).__name__}({_fields_of(schedule)})"
        facts["optimiser"] = f"{type(config.optimizer).__name__}({_fields_of(config.optimizer)})"
    width = max(map(len, facts))
    indent = " " * (width + 2)
    lines = [
        textwrap.fill(f"{name:<{width}}  {value}", _LINE_WIDTH, subsequent_indent=indent, break_on_hyphens=False)
        for name, value in facts.items()
    ]
    return "\n".join([*lines, "", textwrap.fill(config.note or "(no note)", _LINE_WIDTH), "", _FOOTNOTE])


def _rows_with(text: str) -> list[dict[str, str]]:
    return [row for row in table() if text.lower() in " ".join(row.values()).lower()]


def _as_table(rows: list[dict[str, str]]) -> str:
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in COLUMNS}
    lines = ({column: column for column in COLUMNS}, *rows)
    text = ["  ".join(line[column].ljust(widths[column]) for column in COLUMNS).rstrip() for line in lines]
    return "\n".join([*text, "", _FOOTNOTE])


def _row(config: TrainConfig) -> dict[str, str]:
    trains = _trains(config)
    return {
        "recipe": config.name,
        "robot": _robot(config),
        "model": config.model.model_type.value,
        "tunes": _tunes(config) if trains else "-",
        "memory": _memory(config),
        "dataset": _dataset(config),
        "weights": _weights(config.weight_loader) if trains else "-",
    }


def _trains(config: TrainConfig) -> bool:
    return _dataset(config) != "-"


def _dataset(config: TrainConfig) -> str:
    mixture = getattr(config.data, "datasets", ())
    if mixture:
        return "RLDS: " + " + ".join(f"{part.weight:g} {part.name}" for part in mixture)
    return " + ".join(data.repo_id or "-" for data in config.data.members)


def _data_config(config: TrainConfig) -> DataConfig:
    """Without its statistics: they are not wanted here, and may be far away."""
    from openpi.policies import data_half

    return data_half.expanded(config.data, config.assets_dirs, config.model, None)


def _robot(config: TrainConfig) -> str:
    from openpi.policies.robot_spec import find_spec

    spec = find_spec(_data_config(config).data_transforms.inputs)
    return "-" if spec is None else spec.robot


def _tunes(config: TrainConfig) -> str:
    if _has_lora(config.model):
        return "LoRA"
    return "part" if all(config.freeze_filter(path) for path in _LANGUAGE_MODEL_PATHS) else "full"


def _has_lora(model: Any) -> bool:
    return any(expert.has_lora for expert in model.experts)


def _memory(config: TrainConfig) -> str:
    if config.model.experts[0].width < _SMALL_WIDTH:  # type: ignore[attr-defined]  # every model config has it
        return "any"
    if not _trains(config):
        return "8 GB"
    # What trains only a part is not among the published figures; it needs no optimiser state for the rest.
    return {"LoRA": "23 GB", "full": "70 GB", "part": "< 70 GB"}[_tunes(config)]


def _weights(loader: object) -> str:
    path = getattr(loader, "params_path", None)
    if path is None:
        return {"NoOpWeightLoader": "random", "PaliGemmaWeightLoader": "PaliGemma"}.get(type(loader).__name__, "own")
    return path.removesuffix("/params").removeprefix("gs://openpi-assets/checkpoints/")


def _features_read(data: DataConfig) -> list[str]:
    """Features of the dataset that the repack transform looks up, and the task texts."""
    from openpi.shared.tree import flatten

    structures = (getattr(step, "structure", {}) for step in data.repack_transforms.inputs)
    features = [source for structure in structures for source in flatten(structure).values() if source != "prompt"]
    return features + ["task texts"] * data.prompt_from_task


def _client_keys(data: DataConfig) -> list[str]:
    from openpi.policies.robot_spec import find_spec

    spec = find_spec(data.data_transforms.inputs)
    if spec is None:
        return []
    cameras = [camera.key if camera.required else f"{camera.key} (optional)" for camera in spec.cameras]
    return [*cameras, *(f"{vector.key} [{vector.width}]" for vector in spec.state), "prompt"]


def _fields_of(value: Any) -> str:
    return ", ".join(f"{field.name}={getattr(value, field.name)!r}" for field in dataclasses.fields(value))
