"""The folder `<data dir>/<name>/<version>` in which TFDS keeps a dataset: which files, how many records in each.

dataset_info.json   the splits, with the number of records of every file
features.json       what a record holds; not needed, since a record says it too
droid-train.tfrecord-00000-of-02048 ...
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from openpi.data.lerobot.files import check_inside, read_json
from openpi.data.lerobot.meta_values import integer
from openpi.data.path_template import PathTemplate, inside
from openpi.shared.errors import listed
from openpi.shared.strict_json import Json

_INFO_FILE = "dataset_info.json"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_FORMAT = "tfrecord"


@dataclasses.dataclass(frozen=True)
class TfdsFolder:
    """The files of one split.

    Attributes:
        name: of the dataset.
        shards: its files, in order.
        shard_lengths: records in each.
    """

    name: str
    root: Path
    shards: tuple[Path, ...]
    shard_lengths: tuple[int, ...]

    @property
    def filled(self) -> list[tuple[Path, int]]:
        """The files that have records, with their number."""
        return [(path, length) for path, length in zip(self.shards, self.shard_lengths, strict=True) if length]

    @property
    def num_episodes(self) -> int:
        return sum(self.shard_lengths)


def open_folder(data_dir: str | Path, name: str, version: str, *, split: str = "train") -> TfdsFolder:
    """The split's files, all of which are there.

    Raises:
        FileNotFoundError: no such folder, or some of its files are missing.
        ValueError: a folder of another kind, without records, or not on this machine.
    """
    if "://" in str(data_dir):
        raise ValueError(
            f"data.rlds_data_dir is {data_dir}, which is not on this machine; expected a folder. Copy the dataset, or "
            "mount its bucket (gcsfuse)"
        )
    root = Path(data_dir).expanduser() / name / version
    if not (root / _INFO_FILE).is_file():
        raise FileNotFoundError(_not_there(Path(data_dir).expanduser(), name, version))
    try:
        info = read_json(root / _INFO_FILE)
        splits = {entry["name"]: entry for entry in info["splits"]}
        if split not in splits:
            raise ValueError(f"no split '{split}', found: {listed(splits)}")
        shards, lengths = _shards(root, info, splits[split])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{root / _INFO_FILE} cannot be used: {error}") from error
    absent = [path.name for path in shards if not path.is_file()]
    if absent:
        raise FileNotFoundError(
            f"{root}: {len(absent)} of {len(shards)} files are missing: {', '.join(absent[:3])}"
            f"{' ...' if len(absent) > 3 else ''}. Copy them, or download the dataset anew"
        )
    return TfdsFolder(name, root, shards, lengths)


def _shards(root: Path, info: Mapping[str, object], split: Json) -> tuple[tuple[Path, ...], tuple[int, ...]]:
    lengths = tuple(integer(length, "an entry of shardLengths") for length in split["shardLengths"])
    if not sum(lengths):
        raise ValueError(f"split '{split['name']}' has no records")
    kind = info.get("fileFormat", _FORMAT)
    if kind != _FORMAT:
        raise ValueError(f"the files are in the format '{kind}', only '{_FORMAT}' can be read")
    count = f"{len(lengths):05d}"
    names = {"DATASET": str(info["name"]), "SPLIT": str(split["name"]), "FILEFORMAT": kind, "NUM_SHARDS": count}
    # One of the two says which file it is.
    numbers = {"SHARD_INDEX", "SHARD_X_OF_Y"}
    template = PathTemplate(
        split.get("filepathTemplate") or _TEMPLATE,
        "filepathTemplate",
        required=(),
        optional={*names, *numbers},
        names={*names, *numbers},
    )
    paths = []
    for i in range(len(lengths)):
        name = template.format(**names, SHARD_INDEX=f"{i:05d}", SHARD_X_OF_Y=f"{i:05d}-of-{count}")
        paths.append(inside(root, name, "filepathTemplate"))
        check_inside(root, paths[-1])
    if len(set(paths)) != len(paths):
        raise ValueError(f"filepathTemplate gives one name to several files: '{paths[0].name}'")
    return tuple(paths), lengths


def _not_there(data_dir: Path, name: str, version: str) -> str:
    """What is wrong with a path that has no dataset, as far as the folders above it tell."""
    wanted = f"dataset '{name}' version {version} is not at {data_dir / name / version} (no {_INFO_FILE} there)"
    if (data_dir / _INFO_FILE).is_file() or (data_dir / version / _INFO_FILE).is_file():
        steps = data_dir.parent if (data_dir / version).is_dir() else data_dir.parent.parent
        return f"{wanted}: data.rlds_data_dir is the dataset's own folder; expected the one above, {steps}"
    if (data_dir / name).is_dir():
        return f"{wanted}; versions there: {listed(_folders(data_dir / name))}"
    if data_dir.is_dir():
        return f"{wanted}; data.rlds_data_dir holds {listed(_folders(data_dir))}"
    return f"{wanted}: {data_dir} does not exist. Set --data.rlds-data-dir to the folder that holds {name}/{version}"


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())[:10]
