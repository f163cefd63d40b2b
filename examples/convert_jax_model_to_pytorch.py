"""A JAX checkpoint as PyTorch's `model.safetensors`, with the flags of the published script.

    convert_jax_model_to_pytorch.py --checkpoint_dir DIR --config_name pi05_libero --output_path OUT --precision float32
    convert_jax_model_to_pytorch.py --checkpoint_dir DIR --config_name pi05_libero --inspect_only

`openpi convert-checkpoint` does the same and more. To serve a JAX checkpoint with PyTorch, nothing has to be converted:
`openpi serve DIR --backend pytorch`.
"""

import argparse
import sys
from pathlib import Path

from openpi.checkpoints.checkpoint import Checkpoint
from openpi.cli.checkpoints import convert_checkpoint
from openpi.training.recipe_io import recipe_of


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.inspect_only:
        return _inspect(args.checkpoint_dir, args.config_name)
    if args.output_path is None:
        _parser().error("--output_path is needed, except with --inspect_only")
    options = [f"--dtype={args.precision}", "--to=pytorch"]
    if args.config_name is not None:
        options.append(f"--config={args.config_name}")
    return convert_checkpoint.main([args.checkpoint_dir, str(args.output_path), *options])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", "--checkpoint-dir", required=True, help="folder with params/, or a URL")
    parser.add_argument("--config_name", "--config-name", help="recipe of a checkpoint that carries none")
    parser.add_argument("--output_path", "--output-path", type=Path, help="folder to write; must not exist")
    parser.add_argument("--precision", choices=convert_checkpoint.DTYPES, default="bfloat16", help="of all weights")
    parser.add_argument("--inspect_only", "--inspect-only", action="store_true", help="only list the tensors")
    return parser


def _inspect(place: str, config: str | None) -> int:
    try:
        checkpoint = Checkpoint.open(place)
        weights = checkpoint.weights(recipe_of(checkpoint, config).model)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(sorted(weights.report.loaded)))
    print(weights.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
