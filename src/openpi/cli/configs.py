"""`openpi configs [TEXT]`: the registered recipes as a table, or those that a text occurs in.

Memory classes are those of the published models: serving takes 8 GB or more of GPU memory, LoRA 23, full fine-tuning 70
in all. The small models of the simulator run anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openpi.training.config import TrainConfig

SUMMARY = "the registered recipes as a table"

COLUMNS = ("recipe", "robot", "model", "tunes", "memory", "dataset", "weights")
_SMALL_WIDTH = 512


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="openpi configs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", nargs="?", default="", help="only rows in which it occurs")
    parser.add_argument("--json", action="store_true", help="one object per recipe")
    args = parser.parse_args(argv)
    rows = [row for row in table() if args.text.lower() in " ".join(row.values()).lower()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"openpi configs: no recipe with '{args.text}' in its row", file=sys.stderr)
        return 1
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in COLUMNS}
    for row in ({column: column for column in COLUMNS}, *rows):
        print("  ".join(row[column].ljust(widths[column]) for column in COLUMNS).rstrip())
    return 0


def table() -> list[dict[str, str]]:
    """One row per registered recipe, by `COLUMNS`."""
    from openpi.training.config import config_names, get_config

    return [_row(get_config(name)) for name in config_names()]


def _row(config: TrainConfig) -> dict[str, str]:
    trains = config.data.repo_id is not None
    return {
        "recipe": config.name,
        "robot": _robot(config),
        "model": config.model.model_type.value,
        "tunes": "-" if not trains else "LoRA" if _has_lora(config.model) else "full",
        "memory": _memory(config.model, trains=trains),
        "dataset": config.data.repo_id or "-",
        "weights": _weights(config.weight_loader) if trains else "-",
    }


def _robot(config: TrainConfig) -> str:
    from openpi.policies.robot_spec import find_spec

    # Statistics are not wanted here, and may be far away.
    data = dataclasses.replace(config.data, assets=dataclasses.replace(config.data.assets, assets_dir=None))
    try:
        created = data.create(config.assets_dirs, config.model)
    except ValueError:  # RLDS recipes want a folder first
        return "droid"
    spec = find_spec(created.data_transforms.inputs)
    return "-" if spec is None else spec.robot


def _has_lora(model: Any) -> bool:
    return any(expert.has_lora for expert in model.experts)


def _memory(model: Any, *, trains: bool) -> str:
    if model.experts[0].width < _SMALL_WIDTH:
        return "any"
    if not trains:
        return "8 GB"
    return "23 GB" if _has_lora(model) else "70 GB"


def _weights(loader: Any) -> str:
    path = getattr(loader, "params_path", None)
    if path is None:
        return {"NoOpWeightLoader": "random", "PaliGemmaWeightLoader": "PaliGemma"}.get(type(loader).__name__, "own")
    return path.removesuffix("/params").removeprefix("gs://openpi-assets/checkpoints/")


if __name__ == "__main__":
    sys.exit(main())
