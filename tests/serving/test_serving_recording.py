"""Recorded sessions, in both forms: what they hold, what a killed server leaves, and playing them again."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import signal
import sys
import tracemalloc
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import lz4.frame
import mcap.data_stream
import mcap.reader
import mcap.records
import mcap.stream_reader
import mcap.writer
import numpy as np
import pytest
import zstandard
from foxglove_schemas_protobuf.RawImage_pb2 import RawImage
from test_serving_page import droid_policy, observation

import paths
from crafted_pickles import CRAFTED
from openpi.cli.evaluation import replay
from openpi.cli.serving import serve
from openpi.serving import recording_mcap, recording_npy
from openpi.serving.catalog import CheckpointCatalog
from openpi.serving.live import LiveSession
from openpi.serving.recorded import Exchange, SessionInfo
from openpi.serving.recording import SessionRecorder, find_sessions, read_session
from openpi.serving.recording_npy import read_record
from openpi_client import msgpack_numpy
from openpi_client.positronic_client import PositronicClient
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from openpi_positronic.codecs.catalog import get_codec
from plain_values import ARRAYS, LEAVES, TREES
from serving_live import PATIENCE_S, ServerProcess, TestPolicy, server_thread, until

INFO = SessionInfo("default", "openpi", "127.0.0.1:1", 1.7e9, {"robot": "droid"})
RECIPE = f"{paths.SUPPORT / 'recipes' / 'golden_droid.py'}:recipe"


def ask_everything(port: int) -> tuple[list[dict], list[dict]]:
    """Four sessions: two robots, a simulator, one of Positronic. Returns what the second robot asked and got."""
    asked = [observation() for _ in range(3)]
    for _ in range(2):
        with WebsocketClientPolicy("127.0.0.1", port) as client:
            answers = [client.infer(each) for each in asked]
    with WebsocketClientPolicy("127.0.0.1", port) as client:
        client.infer_batch([observation(), observation()])
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    with PositronicClient("127.0.0.1", port) as robot:
        robot.infer(
            {"robot_state.q": np.zeros(7), "grip": 0.0, "image.wrist": image, "image.exterior": image, "task": "x"}
        )
    return asked, answers


@pytest.mark.parametrize("form", ["npy", "mcap"])
def test_each_session_is_recorded_and_can_be_played_again(tmp_path, capsys, form):
    folder = tmp_path / "records"
    with server_thread(droid_policy, recorder=SessionRecorder(folder, form), codec=get_codec("droid")) as (_, port):
        asked, answers = ask_everything(port)
    sessions = find_sessions(folder)
    assert sessions == sorted(folder.iterdir())
    recorded = [list(read_session(session)) for session in sessions]
    assert [[exchange.step for exchange in session] for session in recorded] == [[0, 1, 2], [0, 1, 2], [0], [0]]
    for exchange, request, answer in zip(recorded[1], asked, answers, strict=True):
        assert msgpack_numpy.packb(exchange.inputs) == msgpack_numpy.packb(request)
        sent = {key: value for key, value in answer.items() if key != "obs_age_s"}  # the client's own
        assert msgpack_numpy.packb(exchange.outputs) == msgpack_numpy.packb(sent)
    assert len(recorded[2][0].inputs) == len(recorded[2][0].outputs["batch"]) == 2

    with server_thread(droid_policy, codec=get_codec("droid")) as (_, port):
        assert replay.main([str(folder), "--port", str(port), "--tolerance", "1e-6"]) == 0
        assert "8 requests" in capsys.readouterr().out
        assert replay.main([str(folder), "--port", str(port)]) == 0
        assert "new noise" not in capsys.readouterr().out
    with server_thread(TestPolicy) as (_, port):
        assert replay.main([str(sessions[0]), "--port", str(port), "--tolerance", "1e-6"]) == 1
        assert replay.main([str(sessions[0]), "--port", str(port)]) == 0
        assert "draw new noise" in capsys.readouterr().out  # differences of two answers are no fault


def test_an_answer_that_is_no_number_is_no_small_difference():
    recorded, now = ({"actions": np.array([[0.0, value]])} for value in (1.0, np.nan))
    assert replay.largest_difference(recorded, now) == replay.largest_difference(now, recorded) == np.inf


def test_a_replay_without_the_key_says_how_to_give_it(tmp_path, capsys):
    with (
        server_thread(TestPolicy, recorder=SessionRecorder(tmp_path)) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        client.infer({"x": np.arange(3.0)})
    with server_thread(TestPolicy, api_key="sesame") as (_, port):
        assert replay.main([str(tmp_path), "--port", str(port)]) == 1
        assert "--api-key KEY or OPENPI_API_KEY" in capsys.readouterr().err
        assert replay.main([str(tmp_path), "--port", str(port), "--api-key", "sesame"]) == 0


def test_a_folder_may_hold_both_forms(tmp_path, capsys):
    for form in ("npy", "mcap"):
        recorder = SessionRecorder(tmp_path, form)
        with (
            server_thread(TestPolicy, recorder=recorder) as (_, port),
            WebsocketClientPolicy("127.0.0.1", port) as client,
        ):
            client.infer({"x": np.arange(3.0)})
    (tmp_path / "notes.txt").write_text("Tuesday")
    with server_thread(TestPolicy) as (_, port):
        assert replay.main([str(tmp_path), "--port", str(port), "--tolerance", "0"]) == 0
    assert "2 requests" in capsys.readouterr().out
    assert replay.main([str(tmp_path / "notes.txt")]) == 1
    assert "is no .mcap file" in capsys.readouterr().err


def test_the_published_form_is_kept(tmp_path):
    with (
        server_thread(droid_policy, recorder=SessionRecorder(tmp_path)) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        answer = client.infer(observation())
    [session] = tmp_path.iterdir()
    record = np.load(session / "step_0.npy", allow_pickle=True).item()
    np.testing.assert_array_equal(record["outputs/actions"], answer["actions"])
    assert record["inputs/prompt"] == "put the cup on the plate"
    assert json.loads((session / "session.json").read_text())["opening"]["contract"]["robot"] == "droid"


def test_robots_do_not_wait_for_a_disk_that_hangs(tmp_path, caplog):
    recorder = SessionRecorder(tmp_path, "mcap")
    policy = TestPolicy()
    recorder.put(lambda: policy.gate.wait(PATIENCE_S))
    with (
        server_thread(lambda: policy, recorder=recorder) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        for i in range(300):
            assert client.infer({"x": float(i)})["actions"][0, 0] == i
        policy.gate.set()
    [session] = find_sessions(tmp_path)
    written = [exchange.step for exchange in read_session(session)]
    assert len(written) + recorder.num_lost == 300
    assert written == list(range(len(written))) and recorder.num_lost >= 40
    assert f"{tmp_path} is too slow" in caplog.text


# MCAP


def write_session(folder: Path, *exchanges: Exchange) -> Path:
    writer = recording_mcap.Writer(folder / "session", INFO)
    for exchange in exchanges:
        writer.write(exchange)
    writer.finish()
    return writer.place


def assert_same(found: Exchange, known: Exchange) -> None:
    """To the last bit: as messages of the wire."""
    first, second = (msgpack_numpy.packb(dataclasses.astuple(each)) for each in (found, known))
    assert first == second


@hypothesis.given(TREES, st.dictionaries(st.text(), TREES, max_size=4))
def test_whatever_the_wire_carries_is_recorded_exactly(tmp_path_factory, inputs, outputs):
    folder = tmp_path_factory.mktemp("mcap")
    sent = [Exchange(0, inputs, outputs, 1, 2), Exchange(1, outputs, inputs, 3, 4)]
    found = list(read_session(write_session(folder, *sent)))
    for exchange, known in zip(found, sent, strict=True):
        assert_same(exchange, known)


NAMED = st.dictionaries(st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"])), LEAVES | ARRAYS)


@hypothesis.given(NAMED, NAMED)
@hypothesis.example({"stamp": np.array(["2026-11-30", "NaT"], "<M8[25s]"), "long": np.array("x" * 16_384)}, {})
@hypothesis.example({"wait": np.array(3, "m8[ms]"), "times": np.zeros((2, 0), ">m8")}, {"a": np.zeros(2, "M8[ns]")})
def test_whatever_the_wire_carries_is_recorded_exactly_in_the_published_form(tmp_path_factory, inputs, outputs):
    writer = recording_npy.Writer(tmp_path_factory.mktemp("npy") / "session", INFO)
    writer.write(Exchange(0, inputs, outputs))
    [found] = read_session(writer.place)
    assert_same(found, Exchange(0, inputs, outputs))


def example(step: int = 0) -> Exchange:
    image = np.random.default_rng(step).integers(0, 256, (6, 8, 3), np.uint8)
    images = {"hwc": image, "chw": np.moveaxis(image, -1, 0), "depth": np.full((120, 100), np.nan, np.float32)}
    inputs = {"images": images, "state": np.arange(3, dtype=np.float32) / 7}
    outputs = {"actions": np.full((2, 3), step + 0.1, np.float32), "server_timing": {"infer_ms": 1.5}}
    return Exchange(step, inputs, outputs, 10**18 + step, 10**18 + step + 5)


def test_a_client_with_any_number_of_names_loses_its_own_recording_and_fills_no_log(tmp_path, caplog):
    recorder = SessionRecorder(tmp_path, "mcap")
    log = recorder.open(LiveSession(1, "openpi", "default", "127.0.0.1:1"), {})
    answer = [msgpack_numpy.packb({"actions": np.zeros((2, 2))})]
    for number in range(8):
        log.write({f"{number}_{name}": 1 for name in range(13_000)}, answer, 0.1)
    for _ in range(100):
        log.write({"x": 1}, answer, 0.1)
    log.close()
    recorder.finish()
    [session] = find_sessions(tmp_path)
    assert [exchange.step for exchange in read_session(session)] == [0, 1, 2, 3, 4]
    assert [record.message for record in caplog.records if "cannot be recorded" in record.message] == [
        f"An exchange cannot be recorded in {tmp_path}: {session} has no room for further names; the rest of this "
        "session is not recorded"
    ]


def test_viewers_find_images_numbers_and_times(tmp_path):
    """By the library's reader for whole files, which starts at the index."""
    sent = [example(step) for step in range(3)]
    with write_session(tmp_path, *sent).open("rb") as file:
        reader = mcap.reader.make_reader(file)
        summary = reader.get_summary()
        assert summary is not None and summary.statistics is not None
        assert (summary.statistics.message_count, summary.statistics.chunk_count) == (3 * 7, 3)
        assert {(channel.topic, summary.schemas[channel.schema_id].name) for channel in summary.channels.values()} == {
            ("/inputs/images/hwc", "foxglove.RawImage"),
            ("/inputs/images/chw", "foxglove.RawImage"),
            ("/inputs/images/depth", "openpi.Value"),
            ("/inputs/state", "openpi.Array"),
            ("/outputs/actions", "openpi.Array"),
            ("/outputs/server_timing/infer_ms", "openpi.Value"),
            ("/exchange", "openpi.Exchange"),
        }
        [told] = reader.iter_metadata()
        assert told.metadata["protocol"] == "openpi" and json.loads(told.metadata["opening"]) == {"robot": "droid"}
        times = []
        for _, channel, message in reader.iter_messages(topics=["/inputs/images/chw", "/outputs/actions"]):
            if channel.topic == "/outputs/actions":
                content = json.loads(message.data)
                assert (content["dtype"], content["shape"]) == ("<f4", [2, 3])
                np.testing.assert_array_equal(content["data"], sent[message.sequence].outputs["actions"].ravel())
            else:
                image = RawImage.FromString(message.data)
                assert image.data == sent[message.sequence].inputs["images"]["hwc"].tobytes()
                assert (image.width, image.height, image.step, image.encoding) == (8, 6, 24, "rgb8")
                assert image.timestamp.ToNanoseconds() == message.log_time
            times.append(message.log_time - 10**18)
        assert times == [0, 1, 2, 5, 6, 7]


def test_a_killed_server_leaves_what_it_had_answered(tmp_path, capsys):
    with (
        ServerProcess(0, "--record", str(tmp_path), "--record-format", "mcap") as server,
        WebsocketClientPolicy("127.0.0.1", server.port, reconnect_timeout_s=0) as client,
    ):
        for i in range(5):
            client.infer({"x": np.full((20, 20, 3), i, np.uint8)})
        until(lambda: sum(1 for file in tmp_path.iterdir() for _ in read_session(file)) == 5)
        server.signal(signal.SIGKILL)
        server.wait()
    with server_thread(TestPolicy) as (_, port):
        assert replay.main([str(tmp_path), "--port", str(port), "--tolerance", "0"]) == 0
    said = capsys.readouterr()
    assert "5 requests" in said.out and "its server was killed" in said.err


def test_a_file_cut_anywhere_holds_all_exchanges_before_the_cut(tmp_path):
    sent = [example(step) for step in range(3)]
    content, cut = write_session(tmp_path, *sent).read_bytes(), tmp_path / "cut.mcap"
    counts = []
    for length in [*range(0, len(content), len(content) // 150), len(content)]:
        cut.write_bytes(content[:length])
        found = list(read_session(cut))
        counts.append(len(found))
        for exchange, known in zip(found, sent, strict=False):
            assert_same(exchange, known)
        assert recording_mcap.origin_of(cut).protocol == "openpi"
    assert counts == sorted(counts) and set(counts) == {0, 1, 2, 3}


def test_damage_is_noticed_and_never_gives_other_values(tmp_path):
    sent = {step: example(step) for step in range(2)}
    damaged = write_session(tmp_path, *sent.values())
    content, num_refused = damaged.read_bytes(), 0
    for position in range(0, len(content), len(content) // 200):
        damaged.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            found = list(read_session(damaged))
        except ValueError as refused:
            assert "session.mcap is " in str(refused)
            num_refused += 1
            continue
        for exchange in found:
            assert_same(exchange, sent[exchange.step])
    assert num_refused > 10


def test_a_file_of_another_program_is_no_recording(tmp_path, capsys):
    with (tmp_path / "stranger.mcap").open("wb") as file:
        writer = mcap.writer.Writer(file)
        writer.start()
        writer.finish()
    assert replay.main([str(tmp_path)]) == 1
    assert "stranger.mcap is no recording of openpi serve" in capsys.readouterr().err
    with (tmp_path / "stranger.mcap").open("wb") as file:
        writer = mcap.writer.Writer(file)
        writer.start()
        writer.add_metadata(recording_mcap._INFO, {})
        writer.finish()
    assert replay.main([str(tmp_path)]) == 1
    assert "stranger.mcap is damaged: its metadata" in capsys.readouterr().err


def test_without_the_package_one_line_names_the_extra(tmp_path, capsys, monkeypatch, golden):
    file = write_session(tmp_path, example())
    monkeypatch.setitem(sys.modules, "mcap.records", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "openpi.serving.recording_mcap")
    monkeypatch.delattr("openpi.serving.recording_mcap")
    place = [str(golden / "pi05" / "checkpoint"), "--config", RECIPE]
    assert serve.main([*place, "--record", str(tmp_path / "records"), "--record-format", "mcap"]) == 1
    assert replay.main([str(file)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["openpi serve", "openpi replay"]
    assert all("uv sync --extra recording" in line for line in lines)
    assert not (tmp_path / "records").exists()


# The form of NumPy


class Exploit:
    def __reduce__(self):
        return (os.system, ("touch /tmp/exploited",))


def test_a_record_that_is_more_than_data_is_refused(tmp_path):
    path = tmp_path / "step_0.npy"
    np.save(path, np.asarray({"inputs/x": Exploit()}, dtype=object))
    with pytest.raises(ValueError, match=r"it asks for posix\.system, which is no data"):
        read_record(path)
    np.save(path, np.zeros(3))
    with pytest.raises(ValueError, match="is no record of a request"):
        read_record(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="is no record of a request"):
        read_record(path)


def test_a_crafted_record_is_one_line(tmp_path):
    """NumPy followed the offset of such a field out of the file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    (tmp_path / "step_0.npy").write_bytes(header.getvalue() + CRAFTED["fields out of the item"])
    with pytest.raises(ValueError, match=r"step_0\.npy is no record of a request: it has a dtype 'V8' with parts"):
        list(read_session(tmp_path))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"inputs/x": 1, "outputs": 5}, "is no exchange"),
        ({"inputs": 5, "outputs/actions": np.zeros((2, 2))}, "is no exchange"),
        ({"inputs": [1, 2], "outputs/actions": np.zeros((2, 2))}, "is no exchange"),
        ({"inputs/a": 1, "inputs/a/b": 2, "outputs/actions": np.zeros((4, 2))}, "'a/b' lies within a value, 'a'"),
        ({f"inputs/{'a/' * 3000}x": 1, "outputs/actions": np.zeros((4, 2))}, "is nested too deeply"),
        ({"inputs/x": 2**200, "outputs/actions": np.zeros((4, 2))}, "'x' cannot be sent"),
        ({"inputs/x": 1.0, "outputs/actions/a": "abc"}, "argument must be"),
    ],
)
def test_a_record_that_no_server_writes_is_refused_in_one_line(tmp_path, capsys, record, reason):
    np.save(tmp_path / "step_0.npy", np.asarray(record, dtype=object))
    with server_thread(TestPolicy) as (_, port):
        assert replay.main([str(tmp_path), "--port", str(port)]) == 1
    err = capsys.readouterr().err
    [line] = [line for line in err.splitlines() if line.startswith("openpi replay: ")]
    assert reason in line and "Traceback" not in err


def test_an_error_in_a_record_moves_no_cursor(tmp_path, capsys):
    record = {"inputs/x": 1.0, "outputs/error": "\x1b[2Jgone\nopenpi replay: forged" + "x" * 10_000}
    np.save(tmp_path / "step_0.npy", np.asarray(record, dtype=object))
    with server_thread(TestPolicy) as (_, port):
        replay.main([str(tmp_path), "--port", str(port)])
    told = capsys.readouterr().out
    assert r"\x1b[2Jgone\nopenpi replay: forged" in told and "\x1b" not in told and len(told) < 4000


def compressed(file: Path, compression: mcap.writer.CompressionType) -> Path:
    """A recording as other programs leave it."""
    target = file.with_name(f"{compression.name}.mcap")
    with file.open("rb") as source, target.open("wb") as sink:
        writer = mcap.writer.Writer(sink, compression=compression)
        writer.start()
        channels = {}
        for record in mcap.stream_reader.StreamReader(source).records:
            match record:
                case mcap.records.Schema():
                    writer.register_schema(record.name, record.encoding, record.data)
                case mcap.records.Channel():
                    told = (record.topic, record.message_encoding, record.schema_id, record.metadata)
                    channels.setdefault(record.id, None)
                    channels[record.id] = channels[record.id] or writer.register_channel(*told)
                case mcap.records.Message():
                    channel = channels[record.channel_id]
                    writer.add_message(channel, record.log_time, record.data, record.publish_time, record.sequence)
                case mcap.records.Metadata():
                    writer.add_metadata(record.name, record.metadata)
        writer.finish()
    return target


@pytest.mark.parametrize("compression", [mcap.writer.CompressionType.ZSTD, mcap.writer.CompressionType.LZ4])
def test_recordings_that_were_compressed_are_read(tmp_path, compression):
    known = [example(step) for step in range(3)]
    file = compressed(write_session(tmp_path, *known), compression)
    for found, exchange in zip(read_session(file), known, strict=True):
        assert_same(found, exchange)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("claimed", [2**30, 1000])
def test_a_chunk_unpacks_to_what_it_claims_and_to_no_more_than_its_budget(tmp_path, compression, claimed):
    content = bytes(2**28)
    data = zstandard.compress(content) if compression == "zstd" else lz4.frame.compress(content)
    assert len(data) < 2**21
    file = tmp_path / "bomb.mcap"
    with file.open("wb") as sink:
        records = mcap.data_stream.RecordBuilder()
        writer = mcap.writer.Writer(sink)
        writer.start()
        mcap.records.Chunk(compression, data, 0, 0, 0, claimed).write(records)
        sink.write(records.end())
    tracemalloc.start()
    expected = "a chunk would take 1,073,741,824 bytes" if claimed == 2**30 else "something else than the 1000 bytes"
    with pytest.raises(ValueError, match=expected):
        list(read_session(file))
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.mark.parametrize("form", ["npy", "mcap"])
def test_refused_requests_are_recorded_with_their_error_and_compared(tmp_path, capsys, form):
    with (
        server_thread(TestPolicy, recorder=SessionRecorder(tmp_path, form)) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        for request in ({"x": 1.0}, {"refuse": "'state' is odd"}, {"x": 2.0}):
            with contextlib.suppress(RuntimeError):
                client.infer(request)
    [session] = find_sessions(tmp_path)
    recorded = list(read_session(session))
    assert [exchange.inputs for exchange in recorded] == [{"x": 1.0}, {"refuse": "'state' is odd"}, {"x": 2.0}]
    assert recorded[1].outputs == {"error": "ObservationError: 'state' is odd"}
    with server_thread(TestPolicy) as (_, port):
        assert replay.main([str(tmp_path), "--port", str(port), "--tolerance", "0"]) == 0
    error = "an error (ObservationError: 'state' is odd)"
    assert f"then {error}, now {error}" in capsys.readouterr().out
    with server_thread(droid_policy) as (_, port):
        assert replay.main([str(tmp_path), "--port", str(port)]) == 1
    assert "2 requests that were answered then are refused now" in capsys.readouterr().err


def test_a_recording_is_played_to_the_model_it_was_made_with(tmp_path, capsys, caplog):
    def loaded(place: str) -> TestPolicy:
        policy = TestPolicy()
        policy.infer = lambda obs: {"actions": np.full((4, 2), float(place), np.float32)}
        return policy

    both = CheckpointCatalog(loaded, named={"one": "1", "two": "2"})
    with (
        server_thread(both, recorder=SessionRecorder(tmp_path)) as (_, port),
        WebsocketClientPolicy(f"ws://127.0.0.1:{port}/?model=two") as client,
    ):
        assert client.infer({"x": 1.0})["actions"][0, 0] == 2
    with server_thread(both) as (_, port):
        assert replay.main([str(tmp_path), "--port", str(port), "--tolerance", "0"]) == 0
        assert "asks model two" in capsys.readouterr().out
        assert replay.main([str(tmp_path), "--port", str(port), "--model", "nope"]) == 1
        assert "no model 'nope'; there are one, two" in capsys.readouterr().err
    with server_thread(CheckpointCatalog(loaded, named={"one": "1"})) as (_, port):
        assert replay.main([str(tmp_path), "--port", str(port), "--tolerance", "0"]) == 1
    said = capsys.readouterr().err + caplog.text
    assert "model 'two'" in said and "its default is asked" in said
