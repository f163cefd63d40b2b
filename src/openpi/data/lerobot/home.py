"""Where a LeRobot dataset lies: a local folder, the local LeRobot home, or the Hugging Face hub."""

import os
from pathlib import Path

from openpi.shared import download
from openpi.shared.errors import first_line

INFO_FILE = Path("meta/info.json")
FORMAT_VERSIONS = ("v3.0", "v2.1", "v2.0")
"""On-disk formats we read, newest first. A published dataset carries its format as a git tag of this name."""


def lerobot_home() -> Path:
    """`$HF_LEROBOT_HOME`, else `lerobot` inside the Hugging Face home."""
    if home := os.environ.get("HF_LEROBOT_HOME"):
        return Path(home).expanduser()
    hf_home = os.environ.get("HF_HOME") or Path("~/.cache/huggingface")
    return Path(hf_home).expanduser() / "lerobot"


def locate_dataset(repo_id_or_path: str | Path, root: str | Path | None = None, *, may_download: bool = True) -> Path:
    """Returns the folder of a dataset, downloading it from the hub if it is nowhere on this machine.

    Args:
        repo_id_or_path: `user/name`, or a folder that holds `meta/info.json`.
        root: the folder to use regardless of the id.
        may_download: ask the hub for what is not on this machine.
    Raises:
        FileNotFoundError: the folder given is no dataset, or the id is not local and cannot be fetched.
    """
    if root is not None:
        return _require_dataset(Path(root).expanduser())
    folder = Path(repo_id_or_path).expanduser()
    if (folder / INFO_FILE).is_file():
        return folder
    if _is_path(repo_id_or_path):
        return _require_dataset(folder)
    local = lerobot_home() / repo_id_or_path
    if (local / INFO_FILE).is_file():
        return local
    if not may_download:
        raise FileNotFoundError(
            f"dataset '{repo_id_or_path}' is not in {local}, and the recipe says local_files_only; put it there "
            "($HF_LEROBOT_HOME moves the place), or pass its folder"
        )
    return download_dataset(str(repo_id_or_path))


def _is_path(repo_id_or_path: str | Path) -> bool:
    """True for what can only be a folder: a repository id is `user/name`, relative, without dots in front."""
    text = str(repo_id_or_path)
    return isinstance(repo_id_or_path, Path) or text.startswith(("/", ".", "~")) or Path(text).is_dir()


def _require_dataset(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"dataset folder {folder} does not exist")
    if not (folder / INFO_FILE).is_file():
        raise FileNotFoundError(f"{folder} is not a LeRobot dataset: it has no {INFO_FILE}")
    return folder


def download_dataset(repo_id: str) -> Path:
    """Brings a dataset of the hub into the LeRobot home; of one that is there in part, what is missing or another file.

    Raises:
        FileNotFoundError: there is no such dataset, or nobody to ask.
    """
    local = lerobot_home() / repo_id
    if download.is_address(repo_id) or "@" in repo_id:
        url = repo_id if download.is_address(repo_id) else f"hf://datasets/{repo_id}"
        raise FileNotFoundError(
            f"dataset '{repo_id}' is a URL or names a revision; expected a folder, or user/name of the hub. Bring it "
            f"with `openpi fetch {url}`, and give the folder that this prints"
        )
    if "/" not in repo_id:
        raise FileNotFoundError(f"no dataset folder '{repo_id}' in {Path.cwd()} or {local.parent}; correct the path")
    if download.is_offline():
        raise FileNotFoundError(
            f"dataset '{repo_id}' is not in {local}, or not all of it, and OPENPI_OFFLINE is set. Unset it, or put the "
            "dataset there by hand ($HF_LEROBOT_HOME moves the place)"
        )
    import huggingface_hub

    try:
        revision = _published_revision(huggingface_hub.HfApi(), repo_id)
        # The file that a dataset is known by comes last, so that a download that was cut is not taken for one.
        for later in ([str(INFO_FILE)], None):
            huggingface_hub.snapshot_download(
                repo_id, repo_type="dataset", revision=revision, local_dir=local, ignore_patterns=later
            )
    except Exception as error:  # the hub raises types of its own, and of the HTTP library below it
        raise FileNotFoundError(
            f"dataset '{repo_id}' is neither in {local} nor available from the hub ({first_line(error)}); "
            f"check the id, log in with `hf auth login`, or pass a local folder ($HF_LEROBOT_HOME moves the place)"
        ) from error
    return _require_dataset(local)


def _published_revision(api, repo_id: str) -> str | None:
    tags = {tag.name for tag in api.list_repo_refs(repo_id, repo_type="dataset").tags}
    return next((version for version in FORMAT_VERSIONS if version in tags), None)
