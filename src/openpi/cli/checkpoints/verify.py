"""`openpi verify CHECKPOINT`: whether a checkpoint is what was written, and both backends compute the same.

Compares every file with the checkpoint's checksums, and the base of adapters with what they know of it. Where it has a
certificate, compares every tensor with it, too, and runs a small model cut out of the checkpoint on the certificate's
inputs, with each backend that is installed. Exit codes: 0 = OK; 1 = something differs (the first is named), or there is
nothing to compare with; 2 = bad command line.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from openpi.cli.console import command, configure_logging, make_parser

if TYPE_CHECKING:
    from openpi.checkpoints.checkpoint import Checkpoint


@command("openpi verify")
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    configure_logging()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the certificate is of float32 on a processor
    from openpi.checkpoints.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(args.checkpoint)
    if args.accept:
        _accept(checkpoint.folder)
    else:
        _verify(checkpoint, args.config, is_writing=args.write)


def _accept(checkpoint: Path) -> None:
    from openpi.weights import checksums

    for change in checksums.accept(checkpoint):
        print(change)
    print(f"written: {checkpoint / checksums.CHECKSUMS_FILE}")


def _verify(checkpoint: Checkpoint, config: str | None, *, is_writing: bool) -> None:
    from openpi.policies import parity
    from openpi.training.recipe_io import recipe_of
    from openpi.weights import checksums, opening

    folder = checkpoint.folder
    has_sums = _check_files(folder)
    model = recipe_of(checkpoint, config).model
    if has_sums and not is_writing and not (folder / parity.PARITY_FILE).is_file():
        weights = checkpoint.weights(model)
        if weights.base is not None:
            opening.check_base(weights.table, weights.base)
        print("there is no certificate, so backends are not compared (`openpi verify --write` makes one)")
    else:
        for name, error in (parity.certify if is_writing else parity.verify)(folder, model).items():
            print(f"{name}: largest error {error:.1e} (at most {parity.TOLERANCE:g})")
    if is_writing:
        checksums.write(folder, only=(parity.PARITY_FILE, parity.ARRAYS_FILE) if has_sums else None)
    print("OK" if not is_writing else f"written: {folder / parity.PARITY_FILE}")


def _check_files(checkpoint: Path) -> bool:
    """Whether there are checksums of the files; raises ValueError where they are others."""
    from openpi.weights.checksums import Checksums

    sums = Checksums.find(checkpoint)
    if sums is None:
        return False
    gone = sums.check_all()
    if gone:
        raise ValueError(
            f"{sums.folder} lacks {len(gone)} of the files that were written, such as {gone[0]}: bring the checkpoint "
            f"here again. If that is meant, `openpi verify {sums.folder} --accept` takes the files as they are now"
        )
    size = sum(entry.num_bytes for entry in sums.files.values())
    print(f"{len(sums.files)} files ({size / 1e9:.2f} GB): as written")
    return True


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi verify", __doc__)
    parser.add_argument("checkpoint", help="a step's folder, a run's folder (its latest step), or a URL")
    parser.add_argument("--config", metavar="RECIPE", help="recipe of a checkpoint that carries none")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="write a certificate of the weights as they are")
    what.add_argument(
        "--accept", action="store_true", help="take the files as they are now, such as after editing one on purpose"
    )
    return parser
