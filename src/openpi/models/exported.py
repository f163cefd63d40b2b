"""Models of the first public releases: a serialised `jax.export` graph with its weights and statistics in one folder.

    <model>/graph                                       the computation, for one sample
    <model>/_METADATA ...                               an Orbax tree with the top key `params`
    <model>/processors/<name>/<step>/norm_stats.msgpack

Nothing in these files runs but the graph, which is StableHLO: arithmetic on arrays, without access to files, network or
this process; a graph that calls something else is refused. Statistics are read as numbers of plain dtypes.
Source: the training specification, section 4.8. Reading a graph needs the extra `exported`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import msgpack
import numpy as np

from openpi.shared.errors import first_line, install_hint
from openpi.shared.normalize import NormStats
from openpi.shared.tree import differences, flatten, unflatten
from openpi.weights import orbax_io

if TYPE_CHECKING:
    from jax import export


GRAPH_FILE = "graph"

_NDARRAY_EXTENSION = 1  # flax's msgpack type of an array: (shape, dtype name, bytes)
_STATS_DTYPES = ("float32", "float64")
_MAX_STATS_BYTES = 1 << 20
# Calls out of a graph that compute, place, or describe shapes. Others, such as callbacks into Python, take addresses of
# this process from the file.
_HARMLESS_CALLS = re.compile(
    r"Sharding|SPMD(FullToShard|ShardToFull)Shape|annotate_device_placement|shape_assertion|(cu|hip)_threefry2x32(_ffi)?"
    r"|stablehlo\.dynamic_\w+"
)
_CALL_TARGET = re.compile(r'custom_call @"?([^"(\s]+)|call_target_name = "([^"]*)"')
# What the reader of graphs raises for bytes that are none.
_UNREADABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    ArithmeticError,
    MemoryError,
    RecursionError,
    RuntimeError,
    struct.error,
)


@dataclasses.dataclass(frozen=True)
class Graph:
    """A frozen computation: fixed shapes, one sample at a time, its own options. Only the computation: no weights.

    Attributes:
        exported: the deserialised graph.
        params_spec: the leaves that it uses of the weights.
        example_spec: shapes and dtypes of `example`, nested as in `sample_actions`.
        sample_spec: the sampling options that it takes.
    """

    exported: Any
    params_spec: Mapping[str, Any]
    example_spec: Mapping[str, Any]
    sample_spec: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path | str) -> Self:
        """Of a model folder.

        Raises:
            FileNotFoundError: no graph in it.
            ValueError: it is damaged, has another signature, or calls something else than numerics.
            ImportError: the extra is not installed.
        """
        file = Path(folder) / GRAPH_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no file 'graph'; expected an exported model of the first releases")
        exported, text = _deserialize(file)
        _refuse_calls(file, text)
        try:
            (params, _, example, sample), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
            (actions,) = exported.out_avals
            if len(actions.shape) != 2 or not {"image", "state", "prompt_tokens"} <= example.keys():
                raise ValueError(f"actions of shape {actions.shape} from {sorted(example)}")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} has another signature than exported models: (params, rng, example, options) -> actions "
                f"({first_line(error)})"
            ) from error
        return cls(exported, params, example, sample)

    @property
    def action_horizon(self) -> int:
        return self.exported.out_avals[0].shape[0]

    @property
    def action_dim(self) -> int:
        return self.exported.out_avals[0].shape[1]

    @property
    def max_token_len(self) -> int:
        return self.example_spec["prompt_tokens"].shape[0]

    def check_platform(self) -> None:
        """Raises ValueError where the graph cannot run on what JAX has here."""
        here = jax.devices()[0].platform
        names = {"gpu": ("cuda", "rocm"), "cuda": ("cuda",)}.get(here, (here,))
        if not set(names) & set(self.exported.platforms):
            raise ValueError(
                f"the graph was exported for {' and '.join(self.exported.platforms)}, and JAX runs on {here} here. "
                "Serve it where it runs, or make a checkpoint of it that runs anywhere: `openpi convert-checkpoint`"
            )


@dataclasses.dataclass(frozen=True)
class ExportedModel(Graph):
    """A graph with its weights.

    Attributes:
        params: the leaves that the graph uses, on the device.
    """

    params: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Reads a model folder.

        Raises:
            FileNotFoundError, ImportError: as of `Graph.read`.
            ValueError: as of `Graph.read`; or the weights do not fit it, or are damaged.
        """
        graph = Graph.read(folder)
        stored, wanted = flatten(orbax_io.read_params(folder)), flatten(graph.params_spec)
        missing = differences(wanted, {path: leaf for path, leaf in stored.items() if path in wanted})
        if missing:
            raise ValueError(f"the weights in {folder} do not fit its graph:\n  " + "\n  ".join(missing[:10]))
        cast = {path: np.asarray(stored[path]).astype(leaf.dtype, copy=False) for path, leaf in wanted.items()}
        fields = {field.name: getattr(graph, field.name) for field in dataclasses.fields(Graph)}
        return cls(**fields, params=jax.device_put(unflatten(cast)))

    @functools.cached_property
    def _call(self) -> jax.stages.Wrapped:
        return jax.jit(self.exported.call)

    def sample_actions(
        self, rng: jax.Array | int, example: Mapping[str, object], sample_kwargs: Mapping[str, object] | None = None
    ) -> np.ndarray:
        """Actions f32[ah ad] for one sample.

        Args:
            rng: a key, or the seed of one.
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
        key = jax.random.key(rng) if isinstance(rng, int) else rng
        result = self._call(self.params, jax.random.key_data(key), unflatten(cast), options)
        return np.asarray(result["actions"], np.float32)


def processors(folder: Path | str) -> list[str]:
    """Names of the processors of an exported model."""
    root = Path(folder) / "processors"
    return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def choose_processor(folder: Path | str, name: str | None = None, default: str | None = None) -> str:
    """The processor by this name, else the default one if it is there, else the only one.

    Raises:
        ValueError: there is none of that name, or several and no name; those present are listed.
    """
    names = processors(folder)
    if name is None:
        name = default if default in names else names[0] if len(names) == 1 else None
    if name is None or name not in names:
        what = "no processor is named" if name is None else f"there is no processor {name!r}"
        raise ValueError(f"{what}; {folder} has: {', '.join(names) or 'none'}. Name one of them")
    return name


def load_norm_stats(folder: Path | str, processor: str | None = None) -> dict[str, NormStats]:
    """The z-score statistics of one processor of an exported model, under `state` and `actions`.

    Args:
        processor: its name; None = the only one.
    Raises:
        ValueError: as of `choose_processor`, or the statistics are damaged.
    """
    root = Path(folder) / "processors" / choose_processor(folder, processor)
    files = sorted(root.glob("*/norm_stats.msgpack"))
    documents = [_document(file) for file in files]
    try:
        if len(documents) == 1:
            (both,) = documents
            return {"state": _stats(both["input_norms"]["state"]), "actions": _stats(both["output_norms"]["actions"])}
        if len(documents) == 2:  # the older form, one file per vector
            actions, state = documents
            return {"state": _stats(state), "actions": _stats(actions)}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"the statistics in {root} are damaged ({first_line(error)})") from error
    raise ValueError(f"{root} holds {len(documents)} files norm_stats.msgpack; expected one or two")


def _deserialize(graph: Path) -> tuple[export.Exported, str]:
    """The graph, and its text."""
    from jax import export

    try:
        exported = export.deserialize(bytearray(graph.read_bytes()))
        return exported, exported.mlir_module()
    except ImportError as error:
        raise ImportError(f"reading exported models needs flatbuffers; {install_hint('exported')}") from error
    except _UNREADABLE as error:
        raise ValueError(
            f"{graph} is damaged, or of a version of JAX that this one does not read ({first_line(error)[:200]})"
        ) from error


def _refuse_calls(file: Path, text: str) -> None:
    """A graph is data; what it may call outside of itself is listed here, not in the file."""
    found = [first or second for first, second in _CALL_TARGET.findall(text)]
    found += ["something without a name"] * (text.count("custom_call") > len(found))
    refused = sorted({target for target in found if not _HARMLESS_CALLS.fullmatch(target)})
    if refused:
        raise ValueError(
            f"{file} calls {', '.join(refused[:5])}, which is no numerics that is known here; it is not run"
        )


def _stats(entry: Mapping[str, np.ndarray]) -> NormStats:
    mean, std = (np.asarray(entry[name], np.float64) for name in ("mean", "std"))
    if mean.ndim != 1 or mean.shape != std.shape or not np.isfinite([mean, std]).all() or (std < 0).any():
        raise ValueError(f"mean of shape {mean.shape} and std of {std.shape}; expected equal, finite vectors, std >= 0")
    return NormStats(mean=mean, std=std)


def _document(file: Path) -> Any:
    try:
        if file.stat().st_size > _MAX_STATS_BYTES:
            raise ValueError(f"{file.stat().st_size:,} bytes; expected at most {_MAX_STATS_BYTES:,}")
        return msgpack.unpackb(file.read_bytes(), ext_hook=_array, raw=False)
    except (ValueError, TypeError, LookupError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"{file} is damaged ({first_line(error)[:200]})") from error


def _array(kind: int, data: bytes) -> np.ndarray:
    if kind != _NDARRAY_EXTENSION:
        raise ValueError(f"statistics hold the msgpack type {kind}; expected arrays only")
    shape, dtype, values = msgpack.unpackb(data, raw=False)
    if dtype not in _STATS_DTYPES:
        raise ValueError(f"statistics are of dtype {dtype!r}; expected {' or '.join(_STATS_DTYPES)}")
    return np.frombuffer(values, np.dtype(dtype)).reshape(shape)
