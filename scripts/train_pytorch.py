"""`torchrun ... scripts/train_pytorch.py CONFIG --exp_name=NAME ...`: `openpi train` with the PyTorch backend."""

import sys

from openpi.cli.training.train import main

if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--backend=pytorch"]))
