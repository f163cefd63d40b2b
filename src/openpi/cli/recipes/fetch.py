"""`openpi fetch RECIPE_OR_URL ... [--list] [--dataset] [--config RECIPE] [--force] [--FIELD=VALUE ...]`: downloads.

Brings what a recipe reads from elsewhere to this machine: the weights that it starts from, statistics, tokenizers, and
with --dataset the dataset; afterwards it trains without a network. Of a checkpoint's URL: the checkpoint, and what
serving it takes besides.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from openpi.cli.console import configure_logging, make_parser

if TYPE_CHECKING:
    from openpi.shared.download import Found
    from openpi.training.config import TrainConfig
    from openpi.training.recipe.requirements import Requirement

_FAILURES = (OSError, ImportError, ValueError)
_UNWANTED = "needs --dataset"


def main(argv: list[str] | None = None) -> int:
    from openpi.shared import download

    arguments, overrides = _parser().parse_known_args(argv)
    configure_logging()
    is_url = download.is_address(arguments.name)
    if is_url and overrides:
        _parser().error(f"{overrides[0]} is a field of a recipe, and {arguments.name} is a URL")
    recipe = arguments.config if is_url else arguments.name
    config = None if recipe is None else _recipe(recipe, overrides)
    needed = _of_url(arguments.name, config) if is_url else _of_recipe(config)
    failed = False
    for requirement in needed:
        is_wanted = requirement.kind != "dataset" or arguments.dataset
        try:
            fetches = is_wanted and not arguments.list
            line = _fetch(requirement, arguments.force) if fetches else _described(requirement, is_wanted)
        except _FAILURES as error:
            failed = failed or is_wanted
            line = f"{_line(requirement, 'FAILED' if is_wanted else _UNWANTED)}\n    {error}"
        print(line, flush=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi fetch", __doc__)
    parser.add_argument("name", help="recipe (a name, path/to/file.py:attribute or package.module:attribute), or a URL")
    parser.add_argument("--list", action="store_true", help="show what there is to fetch and how much; fetch nothing")
    parser.add_argument("--dataset", action="store_true", help="the recipe's dataset too, which may be large")
    parser.add_argument("--config", metavar="RECIPE", help="with a checkpoint's URL: the recipe it will be served with")
    parser.add_argument("--force", action="store_true", help="fetch again what is here already")
    return parser


def _recipe(name: str, overrides: list[str]) -> TrainConfig:
    from openpi.training import config

    return config.cli([name, *overrides], prog="openpi fetch")


def _of_recipe(config: TrainConfig | None) -> list[Requirement]:
    from openpi.training.recipe.requirements import requirements

    assert config is not None
    needed = requirements(config)
    is_rlds = hasattr(config.data, "rlds_data_dir")
    if config.data.repo_id is None and not is_rlds:
        print(f"recipe '{config.name}' only serves: fetch a checkpoint with `openpi fetch URL --config {config.name}`")
    if is_rlds:
        names = ", ".join(f"{dataset.name}/{dataset.version}" for dataset in getattr(config.data, "datasets", ()))
        print(f"data in RLDS form are not fetched; bring {names} to data.rlds_data_dir yourself")
    if not needed:
        print(f"recipe '{config.name}' reads nothing from elsewhere")
    return needed


def _of_url(url: str, config: TrainConfig | None) -> list[Requirement]:
    """Without a recipe we know of one tokenizer that every checkpoint takes."""
    from openpi.models.tokenizer import PALIGEMMA_TOKENIZER_URL
    from openpi.training.recipe.requirements import Requirement, tokenizers

    if not _is_checkpoint(url):
        return [Requirement("files", url)]
    if config is None:
        print("pi0-FAST checkpoints need another tokenizer: name the recipe with --config", file=sys.stderr)
    others = [Requirement("tokenizer", PALIGEMMA_TOKENIZER_URL)] if config is None else tokenizers(config)
    return [Requirement("checkpoint", url), *others]


def _is_checkpoint(url: str) -> bool:
    from openpi.checkpoints.find import MARKS
    from openpi.shared import download

    if urlsplit(url).query:  # behind which no path goes on
        return False
    for mark in MARKS:
        try:
            if download.look_up(f"{url.rstrip('/')}/{mark}"):
                return True
        except _FAILURES:
            continue
    return False


def _fetch(requirement: Requirement, force: bool) -> str:
    """Brings it; says where it is, and whether it was there before."""
    from openpi.data.lerobot.home import download_dataset
    from openpi.shared import download

    before = _find(requirement)
    if before.is_here and not force:
        return _line(requirement, "was here", before)
    if requirement.kind == "dataset":
        download_dataset(_repo_id(requirement))
    else:
        download.maybe_download(requirement.url, force_download=force)
    return _line(requirement, "fetched", _find(requirement))


def _described(requirement: Requirement, is_wanted: bool) -> str:
    found = _find(requirement)
    return _line(requirement, "is here" if found.is_here else "to fetch" if is_wanted else _UNWANTED, found)


def _find(requirement: Requirement) -> Found:
    """Datasets have a place of their own, which they share with LeRobot: it brings descriptions and single episodes."""
    from openpi.data.lerobot.home import lerobot_home
    from openpi.data.lerobot.metadata import is_whole
    from openpi.shared import download, hub

    if requirement.kind != "dataset":
        return download.look_up(requirement.url)
    local = lerobot_home() / _repo_id(requirement)
    if is_whole(local):
        return download.look_up(local)
    if download.is_offline():
        return download.Found(local, False)
    sizes = hub.sizes(requirement.url)
    return download.Found(local, False, len(sizes), sum(sizes))


def _repo_id(dataset: Requirement) -> str:
    return dataset.url.removeprefix("hf://datasets/")


def _line(requirement: Requirement, state: str, found: Found | None = None) -> str:
    from openpi.shared.errors import shown_url
    from openpi.shared.transfer import as_text

    size, path = ("", "") if found is None else (as_text(found.num_bytes), f"\n    {found.path}")
    return f"{requirement.kind:<12}  {state:<15}  {size:>12}  {shown_url(requirement.url)}{path}"
