"""A recorded session as one MCAP file, for `openpi replay` and for viewers such as Foxglove.

    metadata openpi.session           model, protocol, client, start_s, opening
    /inputs/<key>, /outputs/<key>     a message for each value of an exchange:
        foxglove.RawImage             an RGB image (Protobuf); the channel's metadata say which axes it came with
        openpi.Array                  a vector or the like (JSON): {"dtype", "shape", "data": [numbers, row by row]}
        openpi.Value                  anything else (JSON): {"value": ...}
    /exchange                         openpi.Exchange (JSON): ends each exchange, and says where its values belong

Nothing is lost on the way: `read_session` gives the dtypes, shapes and bits that were written. Each exchange is in the
file before the next one begins. So what a killed server leaves lacks nothing but the index at the end, and, if it was
being written, the last exchange. Nothing is compressed: camera images hardly shrink, and robots need the processor.

Sources: the MCAP specification; Foxglove's schema of raw images.
"""

import base64
import contextlib
import io
import json
import logging
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from openpi.serving.recorded import Exchange, Origin, SessionInfo
from openpi.shared import budgets
from openpi.shared.errors import install_hint
from openpi.shared.strict_json import Json
from openpi_client import msgpack_numpy

try:
    import lz4.frame
    import zstandard
    from foxglove_schemas_protobuf.RawImage_pb2 import RawImage
    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from google.protobuf.message import DecodeError
    from mcap.exceptions import McapError
    from mcap.records import Channel, Chunk, DataEnd, McapRecord, Message, Metadata, Schema
    from mcap.stream_reader import StreamReader
    from mcap.well_known import MessageEncoding, SchemaEncoding
    from mcap.writer import CompressionType
    from mcap.writer import Writer as RecordWriter
except ImportError as missing:
    raise ImportError(f"MCAP recordings need another package ({missing}); {install_hint('recording')}") from missing

logger = logging.getLogger(__name__)

_INFO = "openpi.session"
_EXCHANGE_TOPIC = "/exchange"
# Longer arrays are kept as bytes: nobody plots them.
_LONGEST_LISTED = 10_000
# Of values that JSON has no form for: in the encoding of the wire.
_PACKED, _ARRAY = "__msgpack__", "__ndarray__"
_HWC, _CHW = "hwc", "chw"

_IMAGE = RawImage.DESCRIPTOR.full_name
_ARRAY_SCHEMA, _VALUE, _EXCHANGE = "openpi.Array", "openpi.Value", "openpi.Exchange"

_INTEGER, _TEXT = {"type": "integer"}, {"type": "string"}
_PATHS = {"type": "array", "items": {"type": "object", "properties": {"path": {"type": "array", "items": _TEXT}}}}
_JSON_SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    _ARRAY_SCHEMA: {
        "dtype": _TEXT,
        "shape": {"type": "array", "items": _INTEGER},
        "data": {"type": "array", "items": {"type": "number"}},
    },
    _VALUE: {},
    _EXCHANGE: {"step": _INTEGER, "inputs": _PATHS, "outputs": _PATHS},
}

_Path = tuple[str, ...]

# What reading a value that is none of ours raises.
_DAMAGES = (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError, RecursionError, DecodeError)
# What a value takes besides its content.
_VALUE_BYTES = 500


# In a chunk of another program; a record takes some ten.
_MAX_READS = 2_000_000


def _per_exchange() -> budgets.Budget:
    return budgets.Budget(budgets.MAX_ARRAYS_BYTES)


class Writer:
    """See `recording.SessionWriter`."""

    def __init__(self, place: Path, info: SessionInfo) -> None:
        self.place = place.with_name(f"{place.name}.mcap")
        self._file = self.place.open("xb")
        self._writer = RecordWriter(self._file, compression=CompressionType.NONE)
        self._schemas: dict[str, int] = {}
        self._channels: dict[tuple[str, str, str], int] = {}
        opening = json.dumps(info.opening, default=str)
        told = {"model": info.model, "protocol": info.protocol, "client": info.client, "start_s": f"{info.start_s:.6f}"}
        with self._closed_on_error():
            self._writer.start()
            self._writer.add_metadata(_INFO, {**told, "opening": opening})
            self._writer.flush()

    def write(self, exchange: Exchange) -> None:
        received_ns, answered_ns = exchange.received_ns or 0, exchange.answered_ns or 0
        sides = {"inputs": (exchange.inputs, received_ns), "outputs": (exchange.outputs, answered_ns)}
        paths: dict[str, list[dict[str, _Path]]] = {}
        messages: list[tuple[str, str, str, int, bytes]] = []  # All are made before the first is written.
        for side, (tree, time_ns) in sides.items():
            paths[side] = [{"path": path} for path, _ in _leaves(tree)]
            for path, value in _leaves(tree):
                messages.append(("/".join(("", side, *path)), *_encoded(value, time_ns)))
        end = _json({"step": exchange.step, **paths})
        messages.append((_EXCHANGE_TOPIC, _EXCHANGE, "", answered_ns, end))
        with self._closed_on_error():
            for topic, schema, axes, time_ns, data in messages:
                channel = self._channel(topic, schema, axes)
                self._writer.add_message(channel, time_ns, data, time_ns, sequence=exchange.step)
            self._writer.flush()

    def finish(self) -> None:
        with self._closed_on_error():
            self._writer.finish()
        self._file.close()

    def _channel(self, topic: str, schema: str, axes: str) -> int:
        if schema not in self._schemas:
            self._schemas[schema] = self._writer.register_schema(schema, *_definition(schema))
        key = (topic, schema, axes)
        if key not in self._channels:
            encoding = MessageEncoding.Protobuf if schema == _IMAGE else MessageEncoding.JSON
            told = {"axes": axes} if axes else {}
            self._channels[key] = self._writer.register_channel(topic, encoding, self._schemas[schema], told)
        return self._channels[key]

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._file.close()
            if isinstance(error, struct.error):  # the form numbers its topics, up to 65,535
                raise OSError(f"{self.place} has no room for further names") from error
            raise


def origin_of(file: Path) -> Origin:
    """Of a recorded session.

    Raises:
        ValueError: no recording of ours, or damaged.
    """
    for record in _records(file):
        if isinstance(record, Metadata) and record.name == _INFO:
            if "protocol" not in record.metadata:
                raise ValueError(f"{file} is damaged: its metadata '{_INFO}' lack 'protocol'")
            return Origin(record.metadata["protocol"], record.metadata.get("model"))
        if isinstance(record, DataEnd):
            raise ValueError(f"{file} is no recording of openpi serve: it has no metadata '{_INFO}'")
    return Origin()  # Cut short before it was told; nothing was asked either.


def read_session(file: Path) -> Iterator[Exchange]:
    """The exchanges of a session in order; of a server that was killed, all that it had finished.

    Raises:
        ValueError: damaged, or no recording of ours.
    """
    schemas: dict[int, str] = {}
    channels: dict[int, Channel] = {}
    values: list[Any] = []
    budget = _per_exchange()
    for record in _records(file):
        try:
            match record:
                case Schema():
                    schemas[record.id] = record.name
                case Channel():
                    channels[record.id] = record
                case Message() if channels[record.channel_id].topic == _EXCHANGE_TOPIC:
                    yield _exchange(record, values)
                    values, budget = [], _per_exchange()
                case Chunk():
                    budget.spend(record.uncompressed_size, "a chunk")
                case Message():
                    budget.spend(len(record.data) + _VALUE_BYTES, "a value")
                    channel = channels[record.channel_id]
                    values.append((record.log_time, _decoded(record, channel, schemas[channel.schema_id])))
        except _DAMAGES as error:
            raise ValueError(f"{file} is no recording of openpi serve, or damaged: {error!r}") from error


# Values as messages


def _leaves(tree: object, path: _Path = ()) -> Iterator[tuple[_Path, object]]:
    if isinstance(tree, Mapping) and tree and all(isinstance(key, str) for key in tree):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree


def _definition(schema: str) -> tuple[str, bytes]:
    """The encoding and text of a schema."""
    if schema != _IMAGE:
        return SchemaEncoding.JSONSchema, _json(
            {"title": schema, "type": "object", "properties": _JSON_SCHEMAS[schema]}
        )
    files = FileDescriptorSet()
    for file in (*RawImage.DESCRIPTOR.file.dependencies, RawImage.DESCRIPTOR.file):
        file.CopyToProto(files.file.add())
    return SchemaEncoding.Protobuf, files.SerializeToString()


def _encoded(value: Any, time_ns: int) -> tuple[str, str, int, bytes]:
    """Schema, axes of an image, time and content of the message for a value."""
    if axes := _image_axes(value):
        return _IMAGE, axes, time_ns, _raw_image(value, axes, time_ns)
    if isinstance(value, np.ndarray) and _is_listed(value):
        return _ARRAY_SCHEMA, "", time_ns, _json(_listed(value))
    return _VALUE, "", time_ns, _json({"value": _plain(value)})


def _image_axes(value: object) -> str:
    if not (isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.size):
        return ""
    return _HWC if value.shape[-1] == 3 else _CHW if value.shape[0] == 3 else ""


def _raw_image(value: np.ndarray, axes: str, time_ns: int) -> bytes:
    image = value if axes == _HWC else np.moveaxis(value, 0, -1)
    height, width, _ = image.shape
    content = RawImage(width=width, height=height, encoding="rgb8", step=3 * width, data=image.tobytes())
    content.timestamp.FromNanoseconds(time_ns)
    return content.SerializeToString()


def _is_listed(value: np.ndarray) -> bool:
    """Whether JSON's numbers hold the array exactly."""
    is_numeric = value.dtype.kind in "biuf" and value.dtype.itemsize <= 8
    return is_numeric and value.size <= _LONGEST_LISTED and bool(np.isfinite(value).all())


def _listed(value: np.ndarray) -> dict[str, object]:
    return {"dtype": value.dtype.str, "shape": value.shape, "data": value.ravel().tolist()}


def _plain(value: object) -> object:
    """A value as JSON has it."""
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) is list:
        return [_plain(item) for item in value]
    if type(value) is dict and all(type(key) is str and not key.startswith("__") for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray) and _is_listed(value):
        return {_ARRAY: _listed(value)}
    return {_PACKED: base64.b64encode(msgpack_numpy.Packer().pack(value)).decode()}


def _json(content: object) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


# Messages as values


def _exchange(end: Message, values: Sequence[tuple[int, object]]) -> Exchange:
    """From its last message, and the times and values of the ones before."""
    told = json.loads(end.data)
    paths = {side: [tuple(item["path"]) for item in told[side]] for side in ("inputs", "outputs")}
    num_inputs = len(paths["inputs"])
    if len(values) != num_inputs + len(paths["outputs"]):
        raise ValueError(f"step {told['step']} has {len(values)} values, and says that they are others")
    inputs = _tree(paths["inputs"], [value for _, value in values[:num_inputs]])
    outputs = _tree(paths["outputs"], [value for _, value in values[num_inputs:]])
    return Exchange(told["step"], inputs, outputs, values[0][0], end.log_time)


def _decoded(message: Message, channel: Channel, schema: str) -> object:
    if schema == _IMAGE:
        content = RawImage.FromString(message.data)
        image = np.frombuffer(content.data, np.uint8).reshape(content.height, content.width, 3)
        return image if channel.metadata["axes"] == _HWC else np.moveaxis(image, -1, 0)
    if schema == _ARRAY_SCHEMA:
        return _unlisted(json.loads(message.data))
    if schema == _VALUE:
        return _unplain(json.loads(message.data)["value"])
    raise ValueError(f"{channel.topic} has messages of {schema}")


def _tree(paths: Sequence[_Path], values: Sequence[object]) -> object:
    tree: dict[str, Any] = {}
    for path, value in zip(paths, values, strict=True):
        if not path:
            return value
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def _unlisted(content: Json) -> np.ndarray:
    dtype = budgets.plain_dtype(content["dtype"])
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of numbers has the dtype {dtype}")
    return np.array(content["data"], dtype).reshape(content["shape"])


def _unplain(value: object) -> object:
    if isinstance(value, list):
        return [_unplain(item) for item in value]
    if isinstance(value, dict) and _ARRAY in value:
        return _unlisted(value[_ARRAY])
    if isinstance(value, dict) and _PACKED in value:
        return msgpack_numpy.unpackb(base64.b64decode(value[_PACKED]))
    if isinstance(value, dict):
        return {key: _unplain(item) for key, item in value.items()}
    return value


# The file


class _CutShort(Exception):
    """The file ends within a record."""


class _WholeReads:
    """A file whose reads give all they are asked for.

    Attributes:
        num_left: bytes.
    """

    def __init__(self, file: IO[bytes], num_bytes: int, max_reads: float = math.inf) -> None:
        self._file = file
        self.num_left = num_bytes
        self._reads_left = max_reads

    def read(self, count: int) -> bytes:
        if count < 0:
            raise ValueError("a record is shorter than its own fields")
        if count > self.num_left:
            raise _CutShort
        self._reads_left -= 1
        if self._reads_left < 0:
            raise budgets.BudgetError("a chunk has more records than a recording")
        self.num_left -= count
        return self._file.read(count)


def _in_chunk(chunk: Chunk) -> Iterator[McapRecord]:
    """The chunk, then its records one by one; of a file that another program compressed, within a budget."""
    content = _unpacked(chunk)
    if chunk.uncompressed_crc not in (0, zlib.crc32(content)):
        raise ValueError("a chunk is not what its checksum says")
    stream: Any = _WholeReads(io.BytesIO(content), len(content), _MAX_READS)
    yield chunk
    with contextlib.suppress(_CutShort):
        yield from StreamReader(stream, skip_magic=True, emit_chunks=True).records
    if stream.num_left:
        raise ValueError("a chunk ends within a record")


def _unpacked(chunk: Chunk) -> bytes:
    size = chunk.uncompressed_size
    budgets.Budget(budgets.MAX_CHUNK_BYTES).spend(size, "a chunk")
    match chunk.compression:
        case "":
            content = chunk.data
        case "zstd":  # one byte more, to see whether there is more
            reader = zstandard.ZstdDecompressor(max_window_size=budgets.MAX_CHUNK_BYTES).stream_reader(chunk.data)
            content = reader.read(size + 1)
        case "lz4":
            content = lz4.frame.LZ4FrameDecompressor().decompress(chunk.data, max_length=size + 1)
        case other:
            raise ValueError(f"a chunk is compressed by {other!r}; expected zstd or lz4")
    if len(content) != size:
        raise ValueError(f"a chunk unpacks to something else than the {size} bytes it promises")
    return content


def _records(path: Path) -> Iterator[McapRecord]:
    """In the order of the file, as far as it goes."""
    with path.open("rb") as file:
        stream: Any = _WholeReads(file, path.stat().st_size)
        try:
            for record in StreamReader(stream, emit_chunks=True, validate_crcs=True).records:
                yield from _in_chunk(record) if isinstance(record, Chunk) else (record,)
        except _CutShort:
            logger.warning("%s has no end: its server was killed, or is recording still", path)
        except (McapError, struct.error, ValueError, zstandard.ZstdError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged, or no MCAP file: {error}") from error
