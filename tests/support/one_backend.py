"""Work with one framework alone: trains, asks what it trained, converts a checkpoint, then serves until it is stopped.

    python one_backend.py BACKEND DATASET FOLDER

The other framework, and what comes with it, is refused wherever it is imported, also where somebody would go on without
it. Where it is not installed nothing is left to refuse.
"""

import os
import sys
from pathlib import Path

import numpy as np

import paths

OTHERS = {"pytorch": ("jax", "jaxlib", "optax", "orbax", "flax", "chex", "augmax"), "jax": ("torch", "triton")}


class Refusing:
    """A finder before all others."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self._packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self._packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def run(*words: object) -> None:
    from openpi.cli.main import main

    assert main([str(word) for word in words]) == 0, words


def work(backend: str, dataset: str, folder: Path) -> None:
    recipe, frozen = f"{paths.SUPPORT / 'tiny_recipe.py'}:arm", paths.GOLDEN / "checkpoint_v1" / "1"
    short = ("--num-train-steps=2", "--save-interval=0", f"--data.repo-id={dataset}")
    if backend == "pytorch":  # nothing is compiled, so that more costs nothing
        run("train", recipe, "--exp-name=one", "--backend=pytorch", "--holdout-episodes=1", *short)
        observation = {"camera": np.zeros((32, 32, 3), np.uint8), "joints": np.zeros(3, np.float32)}
        np.savez(folder / "observation.npz", prompt=np.asarray("put it down"), **observation)
        trained = (folder / "checkpoints" / "arm" / "one", f"--observation={folder / 'observation.npz'}")
        run("explain", *trained, "--json")
        run("infer", *trained, f"--output={folder / 'actions.npz'}")
        run("convert-checkpoint", frozen, folder / "converted", "--to=pytorch")
        run("verify", folder / "converted")
    else:
        run("train", recipe, "--exp-name=one", *short)
        run("convert-checkpoint", frozen, folder / "converted", "--to=pytorch", "--no-certify")
    # The layout of the other framework, and no backend is named.
    served = frozen if backend == "pytorch" else folder / "converted"
    run("serve", served, "--port=0", f"--port-file={folder / 'port'}", "--num-steps=1")


if __name__ == "__main__":
    sys.meta_path.insert(0, Refusing(OTHERS[sys.argv[1]]))
    os.chdir(sys.argv[3])
    work(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
