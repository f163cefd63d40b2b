"""How a recipe is told which dataset it is run on."""

from __future__ import annotations

from positronic.commands import local_path

ASSET_ID = "lerobot"  # whatever the dataset's folder is called


def data_flags(input_path: str) -> list[str]:
    """Flags of an openpi command, for a dataset at a path or URL."""
    return [f"--data.repo-id={local_path(input_path)}", f"--data.assets.asset-id={ASSET_ID}"]
