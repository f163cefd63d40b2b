"""`openpi tokenizer fit NAME --output DIR [--FIELD=VALUE ...]`: an action tokenizer (FAST) for your own actions.

Trains the byte-pair codec of pi0-FAST on the normalised action chunks of a recipe's dataset, from its columns, and
reports how many tokens a chunk takes and how exactly it comes back. Use it with --model.action-tokenizer-path=DIR.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from openpi.cli.console import command, configure_logging, make_parser


@command("openpi tokenizer")
def main(argv: list[str] | None = None) -> None:
    arguments, overrides = _parser().parse_known_args(argv)
    from openpi.training import config as _config

    config = _config.cli([arguments.name, *overrides], prog="openpi tokenizer fit")
    configure_logging()
    from openpi.training.data import action_tokenizer

    report = action_tokenizer.fit(
        config,
        arguments.output,
        vocab_size=arguments.vocab_size,
        scale=arguments.scale,
        max_frames=arguments.max_frames,
    )
    print(
        f"trained on {report.num_chunks} chunks, vocabulary {report.vocab_size}\n"
        f"a chunk of {report.values_per_chunk} numbers takes {report.tokens_mean:.1f} tokens, {report.tokens_max} at "
        f"most; it comes back with an error of {report.error:.4f} (normalised units, root mean square)\n"
        f"{_beyond(report.share_beyond)}"
        f"written to {report.path}; train with --model.action-tokenizer-path={report.path}"
    )


def _beyond(share: float) -> str:
    if not share:
        return ""
    return (
        f"{share:.1%} of the chunks of other episodes go beyond its range, and are learnt as others: train it on more "
        "(--max-frames), or look for outliers with `openpi stats`\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi tokenizer", __doc__)
    parser.add_argument("action", choices=["fit"])
    parser.add_argument("name", help="recipe: a name, path/to/file.py:attribute or package.module:attribute")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--vocab-size", type=int, default=1024, help="action tokens; default: 1024")
    parser.add_argument("--scale", type=float, default=10, help="finer with larger values; default: 10")
    parser.add_argument("--max-frames", type=int, default=50_000, help="chunks to train on; default: 50000")
    return parser
