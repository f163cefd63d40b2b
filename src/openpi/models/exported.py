"""Models of the first public releases: a serialised `jax.export` graph with its weights and statistics in one folder.

    <model>/graph                                       the computation, for one sample
    <model>/_METADATA ...                               an Orbax tree with the top key `params`
    <model>/processors/<name>/<step>/norm_stats.msgpack

Source: the training specification, section 4.8. Reading a graph needs the extra `exported`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import msgpack
import numpy as np

from openpi.shared.errors import install_hint
from openpi.shared.normalize import NormStats
from openpi.shared.tree import differences, flatten, unflatten
from openpi.weights import orbax_io

_NDARRAY_EXTENSION = 1  # flax's msgpack type of an array: (shape, dtype name, bytes)


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A frozen computation: fixed shapes, one sample at a time, its own options.

    Attributes:
        exported: the deserialised graph.
        params: the leaves the graph uses.
        example_spec: shapes and dtypes of `example`, nested as in `sample_actions`.
        sample_spec: the sampling options that the graph takes.
    """

    exported: Any
    params: Mapping[str, Any]
    example_spec: Mapping[str, Any]
    sample_spec: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Reads a model folder.

        Raises:
            FileNotFoundError: no graph in it.
            ImportError: the extra is not installed.
        """
        folder = Path(folder)
        graph = folder / "graph"
        if not graph.is_file():
            raise FileNotFoundError(f"{folder} has no file 'graph'; expected an exported model of the first releases")
        exported = _deserialize(graph.read_bytes())
        (params, _, example, sample), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        stored = flatten(orbax_io.read_params(folder))
        wanted = flatten(params)
        missing = differences(wanted, {path: leaf for path, leaf in stored.items() if path in wanted})
        if missing:
            raise ValueError(f"the weights in {folder} do not fit its graph:\n  " + "\n  ".join(missing[:10]))
        return cls(exported, unflatten({path: stored[path] for path in wanted}), example, sample)

    @property
    def action_horizon(self) -> int:
        return self.exported.out_avals[0].shape[0]

    @property
    def action_dim(self) -> int:
        return self.exported.out_avals[0].shape[1]

    @property
    def max_token_len(self) -> int:
        return self.example_spec["prompt_tokens"].shape[0]

    def sample_actions(
        self, rng: jax.Array, example: Mapping[str, Any], sample_kwargs: Mapping[str, Any] | None = None
    ) -> np.ndarray:
        """Actions f32[ah ad] for one sample.

        Args:
            example: `image` (per slot uint8[h w 3], and `<slot>_mask`), `state`, `prompt_tokens`, `mask_input`; see
                `example_spec`.
            sample_kwargs: every option of `sample_spec`; default `num_steps=10`.
        Raises:
            ValueError: keys or shapes differ from the spec, or the options from those of the graph.
        """
        options = {"num_steps": 10} if sample_kwargs is None else dict(sample_kwargs)
        if options.keys() != self.sample_spec.keys():
            raise ValueError(f"sampling options {sorted(options)}; this graph takes {sorted(self.sample_spec)}")
        spec = flatten(self.example_spec)
        found = {path: np.asarray(leaf) for path, leaf in flatten(example).items()}
        problems = differences(spec, found)
        if problems:
            raise ValueError("the sample does not fit the exported graph:\n  " + "\n  ".join(problems))
        cast = {path: found[path].astype(leaf.dtype) for path, leaf in spec.items()}
        options = {name: np.asarray(value, self.sample_spec[name].dtype) for name, value in options.items()}
        result = self.exported.call(self.params, jax.random.key_data(rng), unflatten(cast), options)
        return np.asarray(result["actions"], np.float32)


def load_norm_stats(folder: Path | str, processor: str | None = None) -> dict[str, NormStats]:
    """The z-score statistics of one processor of an exported model, under `state` and `actions`.

    Args:
        processor: its name; None = the only one.
    Raises:
        ValueError: several processors and no name, or an unknown one (those present are listed).
    """
    root = Path(folder) / "processors"
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if processor is None and len(names) == 1:
        processor = names[0]
    if processor not in names:
        raise ValueError(f"processor {processor!r}; {folder} has: {', '.join(names) or 'none'}. Name one of them")
    documents = [_unpack(path.read_bytes()) for path in sorted((root / processor).glob("*/norm_stats.msgpack"))]
    if len(documents) == 1:
        (both,) = documents
        return {"state": _stats(both["input_norms"]["state"]), "actions": _stats(both["output_norms"]["actions"])}
    if len(documents) == 2:  # the older form, one file per vector
        actions, state = documents
        return {"state": _stats(state), "actions": _stats(actions)}
    raise ValueError(f"{root / processor} holds {len(documents)} files norm_stats.msgpack; expected one or two")


def _deserialize(graph: bytes) -> Any:
    from jax import export

    try:
        return export.deserialize(bytearray(graph))
    except ImportError as error:
        raise ImportError(f"reading exported models needs flatbuffers; {install_hint('exported')}") from error


def _stats(entry: Mapping[str, np.ndarray]) -> NormStats:
    return NormStats(mean=np.asarray(entry["mean"], np.float64), std=np.asarray(entry["std"], np.float64))


def _unpack(document: bytes) -> Any:
    return msgpack.unpackb(document, ext_hook=_array, raw=False)


def _array(kind: int, data: bytes) -> np.ndarray:
    if kind != _NDARRAY_EXTENSION:
        raise ValueError(f"statistics hold the msgpack type {kind}; expected arrays only")
    shape, dtype, values = msgpack.unpackb(data, raw=False)
    return np.frombuffer(values, np.dtype(dtype)).reshape(shape)
