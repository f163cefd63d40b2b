"""The parity certificate of a checkpoint: proof that its weights are what was meant, and that both backends agree.

    parity.json   a checksum of every tensor, and how far each backend was from the recorded outputs
    parity.npz    inputs of a small model cut out of the checkpoint (`openpi.weights.probe`), and its outputs

Running the whole model would take minutes and tens of GB on a processor; the small one has a layer at each end, parts
of the MLPs and of the token table, and takes seconds. What it leaves out, the checksums cover. Always in float32.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from openpi.shared import budgets, frameworks, strict_json, whole_file
from openpi.shared.errors import first_line
from openpi.shared.strict_json import Json
from openpi.shared.tree import Params
from openpi.weights import released
from openpi.weights.blocks import Weights, told
from openpi.weights.opening import open_weights
from openpi.weights.probe import Probe, Witness

PARITY_FILE = "parity.json"
ARRAYS_FILE = "parity.npz"
TOLERANCE = 1e-4  # of outputs around 1; relative above

_VERSION = 1
_Tensors = Mapping[str, Mapping[str, str]]  # as of `Witness.tensors`


def certify(folder: Path, config: object, meant: Witness | None = None) -> dict[str, float]:
    """Writes the certificate of a checkpoint, after reading its weights again and running them.

    Args:
        config: of the model.
        meant: has seen the tensors on their way into the checkpoint; None = those that are there are meant.
    Returns:
        The largest error of each installed backend.
    Raises:
        ValueError: the checkpoint holds other numbers than meant, or a backend computes something else.
    """
    backends = _installed_backends()
    probe, found = _seen(folder, config)
    tensors = (meant or found).tensors
    _compare_tensors(folder, tensors, found.tensors)
    inputs, params = probe.inputs(), found.tree()
    results = {name: _run(name, probe, params, inputs) for name in backends}
    outputs = results[backends[0]]
    errors = {name: _error(name, result, outputs) for name, result in results.items()}
    document = {
        "version": _VERSION,
        "tolerance": TOLERANCE,
        "backends": {
            name: {"version": importlib.metadata.version(frameworks.PACKAGES[name]), "max_error": errors[name]}
            for name in backends
        },
        "tensors": dict(sorted(tensors.items())),
    }
    arrays = {"outputs": outputs, **{f"inputs/{key}": value for key, value in inputs.items()}}
    with (
        whole_file.replacing(folder / PARITY_FILE) as certificate,
        whole_file.replacing(folder / ARRAYS_FILE) as beside,
    ):
        certificate.write_text(json.dumps(document, indent=1) + "\n")
        with beside.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # the stub takes them for options
    return errors


def verify(folder: Path, config: object, backends: Sequence[str] | None = None) -> dict[str, float]:
    """Checks a checkpoint against its certificate.

    Args:
        backends: to run; None = those that are installed.
    Returns:
        The largest error of each backend.
    Raises:
        FileNotFoundError: there is no certificate.
        ValueError: a tensor or an output is another than when the certificate was written; the first is named.
    """
    document, inputs, outputs = _load(folder)
    probe, found = _seen(folder, config)
    _compare_tensors(folder, document["tensors"], found.tensors)
    names = _installed_backends() if backends is None else backends
    return {name: _error(name, _run(name, probe, found.tree(), inputs), outputs) for name in names}


def outputs(backend: str, weights: Weights, config: object, *others: object) -> list[np.ndarray]:
    """What the small model cut out of these weights gives, in float32; read once for all configurations.

    Args:
        config: of the model that the weights are of.
        others: of models that have some of its weights, of the same sizes.
    """
    probe, witness = _small(weights, config)
    params, inputs = witness.tree(), probe.inputs()
    return [_run(backend, Probe(each), params, inputs) for each in (config, *others)]


def _installed_backends() -> tuple[frameworks.Backend, ...]:
    """Raises ImportError where there is none."""
    frameworks.choose("jax", "a certificate")
    return frameworks.installed()


def _seen(folder: Path, config: object) -> tuple[Probe, Witness]:
    return _small(open_weights(config, folder), config)


def _small(weights: Weights, config: object) -> tuple[Probe, Witness]:
    """Reads all weights."""
    witness = Witness(probe := Probe(config))
    size = released.num_bytes(config, weights.dtype)
    for block in told(weights.blocks(), "read, to be compared", size):
        witness.see(block)
    return probe, witness


def _compare_tensors(folder: Path, meant: _Tensors, found: _Tensors) -> None:
    others = [name for name in sorted(meant.keys() | found.keys()) if meant.get(name) != found.get(name)]
    if others:
        name = others[0]
        raise ValueError(
            f"{len(others)} of {len(meant)} tensors in {folder} are not those that were written; the first is {name}: "
            f"{_described(found.get(name))}, expected {_described(meant.get(name))}. Bring the checkpoint here again"
        )


def _described(tensor: Mapping[str, object] | None) -> str:
    return "none" if tensor is None else f"{tensor['dtype']} with checksum {tensor['crc32']}"


def _run(backend: str, probe: Probe, params: Params, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    if backend == "jax":
        from openpi.models import probe as runner
    else:
        from openpi.models_pytorch import probe as runner
    return runner.run(probe.config, params, inputs)


def _error(backend: str, found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"{backend} gives outputs of shape {found.shape}; recorded are {expected.shape}")
    error = np.abs(found - expected) / np.maximum(1.0, np.abs(expected))
    wrong = np.argwhere(~(error <= TOLERANCE))
    if len(wrong):
        index = tuple(int(i) for i in wrong[0])
        raise ValueError(
            f"{backend} computes something else: {len(wrong)} of {error.size} outputs differ by more than {TOLERANCE}, "
            f"the first is outputs{list(index)} = {found[index]:.6f}, recorded {expected[index]:.6f}"
        )
    return float(error.max())


def _load(folder: Path) -> tuple[Json, dict[str, np.ndarray], np.ndarray]:
    for name in (PARITY_FILE, ARRAYS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}, so there is nothing to compare with; `openpi verify --write` makes a "
                "certificate of the weights as they are now"
            )
    try:
        document = strict_json.read(folder / PARITY_FILE)
        if document["version"] != _VERSION:
            raise ValueError(f"version {document['version']}, expected {_VERSION}")
        with (folder / ARRAYS_FILE).open("rb") as file:
            arrays = budgets.read_npz(file, budgets.Budget(budgets.MAX_ARRAYS_BYTES))
        outputs = arrays.pop("outputs")
        return document, {key.removeprefix("inputs/"): value for key, value in arrays.items()}, outputs
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"the certificate in {folder} is damaged ({first_line(error)})") from error
