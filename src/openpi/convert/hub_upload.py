"""A finished dataset to the Hugging Face hub, with the tag that says its format: libraries look for that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from openpi.data.lerobot.home import FORMAT_VERSIONS
from openpi.shared import download
from openpi.shared.errors import first_line, install_hint

_LICENSE = "apache-2.0"


def push(folder: Path, repo_id: str, *, tags: Sequence[str] = ()) -> None:
    """Makes the repository if there is none, and sends the dataset.

    Args:
        tags: of the dataset's page, such as the robot's name.
    Raises:
        ConnectionError: the hub refuses it, or cannot be reached; the dataset is where it was.
        ImportError: the hub's library is missing.
    """
    if download.is_offline():
        raise ConnectionError(f"'{repo_id}' was not sent: OPENPI_OFFLINE is set; the dataset is in {folder}")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"sending datasets needs another package ({error}); {install_hint('hub')}") from error
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repo_id, repo_type="dataset", exist_ok=True)
        hub.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder)
        hub.upload_file(
            path_or_fileobj=_card(tags).encode(), path_in_repo="README.md", repo_id=repo_id, repo_type="dataset"
        )
        hub.create_tag(repo_id, tag=FORMAT_VERSIONS[0], repo_type="dataset", exist_ok=True)
    except Exception as error:  # of its own types, and of those of the HTTP library below it
        raise ConnectionError(
            f"'{repo_id}' was not sent ({type(error).__name__}: {first_line(error)}); the dataset is in {folder}"
        ) from error


def _card(tags: Sequence[str]) -> str:
    lines = "".join(f"- {tag}\n" for tag in ("LeRobot", *tags))
    return f"---\nlicense: {_LICENSE}\ntask_categories:\n- robotics\ntags:\n{lines}---\n"
