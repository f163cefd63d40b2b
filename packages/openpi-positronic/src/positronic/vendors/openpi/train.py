"""`openpi-train`: training on a converted dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence

import configuronic as cfn

from positronic import commands
from positronic.vendors.openpi.recipe import data_flags

_MEMORY_FRACTION = "0.995"  # the recipe takes 78 GB of an accelerator with 80


@cfn.config(config_name="pi05_positronic_lowmem", resume=False, num_train_steps=None, extra_args=())
def train(
    input_path: str,
    stats_path: str,
    output_path: str,
    exp_name: str,
    config_name: str,
    resume: bool,
    num_train_steps: int | None,
    extra_args: Sequence[str],
) -> None:
    """Trains, with checkpoints in <output_path>/<config_name>/<exp_name>/<step>/."""
    from openpi.cli.training import train as openpi_train

    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _MEMORY_FRACTION)
    arguments = [
        commands.text(config_name),
        f"--exp-name={commands.text(exp_name)}",
        "--resume" if resume else "--overwrite",
        f"--assets-base-dir={commands.local_path(stats_path)}",
        f"--checkpoint-base-dir={commands.local_output(output_path)}",
        *data_flags(input_path),
    ]
    if num_train_steps is not None:
        arguments.append(f"--num-train-steps={num_train_steps}")
    if os.environ.get("WANDB_API_KEY"):
        arguments.append("--wandb-enabled")
    extra = [extra_args] if isinstance(extra_args, str) else [commands.text(arg) for arg in extra_args]
    commands.finish(openpi_train.main([*arguments, *extra]))


def main() -> None:
    commands.run(train)


if __name__ == "__main__":
    main()
