"""`openpi verify CHECKPOINT`: whether a checkpoint's weights are what was written, and both backends compute the same.

Compares a checksum of every tensor with the checkpoint's certificate, and runs a small model cut out of it on the
certificate's inputs, with each backend that is installed. Exit codes: 0 = OK; 1 = something differs (the first is
named), or there is nothing to compare with; 2 = bad command line.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

SUMMARY = "whether a checkpoint is whole and both backends agree on it"

logger = logging.getLogger("openpi")


def main(argv: list[str] | None = None) -> int:
    from openpi.cli.console import configure_logging

    args = _parser().parse_args(argv)
    configure_logging()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the certificate is of float32 on a processor
    from openpi.cli import serve
    from openpi.policies import parity

    try:
        checkpoint = serve.find_checkpoint(args.checkpoint)
        recipe = serve.choose_recipe(checkpoint, args.config)
        check = parity.certify if args.write else parity.verify
        errors = check(checkpoint, recipe.model)
    except (ValueError, OSError, ImportError) as error:
        logger.debug("", exc_info=True)
        print(f"openpi verify: {error}", file=sys.stderr)
        return 1
    for name, error in errors.items():
        print(f"{name}: largest error {error:.1e} (at most {parity.TOLERANCE:g})")
    print("OK" if not args.write else f"written: {checkpoint / parity.PARITY_FILE}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openpi verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a step's folder, a run's folder (its latest step), or a URL")
    parser.add_argument("--config", metavar="RECIPE", help="recipe of a checkpoint that carries none")
    parser.add_argument("--write", action="store_true", help="write a certificate of the weights as they are")
    return parser


if __name__ == "__main__":
    sys.exit(main())
