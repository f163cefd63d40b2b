"""Strictness that only tests switch on: run-time shape checks, no implicit dtype promotion surprises, fixed seeds."""

import ctypes
import gc
import importlib.util
import logging
import os
import platform
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import hypothesis
import jaxtyping
import numpy as np
import pytest

import forked
from paths import GOLDEN

# Hundreds of processes import JAX or PyTorch. Where no bytecode is kept, each compiles them again, for 5 to 10 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("JAX_PLATFORMS", "cpu")
gc.set_threshold(*forked.GC_THRESHOLDS)
# Most of the time of these tests is compiling, for models that then run for milliseconds. An unknown flag ends the
# process, so what only the pinned JAX is known to have is left to it.
_flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.util.find_spec("jax") and metadata.version("jax").startswith("0.10."):
    _flags += [
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
    ]
os.environ.setdefault("XLA_FLAGS", " ".join(_flags))
# Many tests compile the same, in other processes and in the next run: one folder, which the first process of a run
# empties when it has grown large.
_compiled = Path(os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".cache" / "compiled")))
if "PYTEST_XDIST_WORKER" not in os.environ and sum(file.stat().st_size for file in _compiled.glob("*")) > 2**31:
    shutil.rmtree(_compiled)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Without a GPU, kernels in Triton run in its interpreter, which has to be known before PyTorch imports it.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# As many threads as test processes there are cores for.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENPI_DATA_HOME", str(Path(__file__).parent / ".cache"))
os.environ.setdefault("OPENPI_OFFLINE", "1")


def take_ctrl_c() -> None:
    """A shell ignores SIGINT for what it runs in the background, and so would every process that a test starts."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


take_ctrl_c()

# Shapes written in signatures are checked while tests run, and only then; not on a bare machine (benchmarks/on_gpu.py).
jaxtyping.install_import_hook(
    [
        "openpi.models.gemma",
        "openpi.models.siglip",
        "openpi.models.lora",
        "openpi.models.pi0",
        "openpi.models.pi0_fast",
        "openpi.models.action_grammar",
        "openpi.models.augment",
        *(f"openpi.models_pytorch.{name}" for name in ("gemma", "siglip", "lora", "pi0", "pi0_fast")),
    ],
    "beartype.beartype" if importlib.util.find_spec("beartype") else None,
)

# How long an example takes says nothing on a shared machine.
hypothesis.settings.register_profile("openpi", deadline=None)
hypothesis.settings.load_profile("openpi")

HAS_TORCH = importlib.util.find_spec("torch") is not None
collect_ignore_glob = [] if HAS_TORCH else ["*/test_torch_*.py"]


def pytest_report_header() -> str | None:
    if HAS_TORCH:
        return None
    return "PyTorch is not installed: its tests are left out. All tests: uv run --extra torch pytest"


# Files that take longest, first: one that is begun last runs alone at the end, beside an idle core.
_LONGEST = (
    *("demo_pipeline", "models_golden", "training_processes", "robot_programs", "torch_processes", "torch_golden"),
    *("training_run", "torch_training", "deadlines", "on_gpu", "compact", "recipe_families", "convert_positronic"),
    *("realtime_loop", "evaluate", "models_fast_golden", "realtime_safety", "cli_fetch", "weights_pytorch"),
    *("adapters", "realtime_process", "data_reader", "training_sharding", "torch_backends", "torch_compile"),
    *("published_programs", "checkpoints", "torch_start", "init", "training_parts", "positronic_compat", "mixture"),
    *("models_components", "positronic_workflow", "export", "serving_recording", "one_backend", "rtc", "serving_load"),
    "loader_batches",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


_GOODBYE_S = 20
# Ends with the process that it belongs to, which is this one.
_OF_THIS_PROCESS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


@pytest.fixture(scope="session", autouse=True)
def _no_test_leaves_a_process_behind():
    """Processes carry a mark in their environment, so that those whose parent is gone are found, too."""
    os.environ["OPENPI_TESTS_MARK"] = mark = uuid.uuid4().hex
    with forked.server():
        yield
        deadline = time.monotonic() + _GOODBYE_S
        while (left := list(_processes_with(mark))) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid, _ in left:
            os.kill(pid, signal.SIGKILL)
    assert not left, "these processes outlived their tests:\n" + "\n".join(told for _, told in left)


def _processes_with(mark: str) -> Iterator[tuple[int, str]]:
    """Number, and command with the test that started it. Nothing where there is no `/proc`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(part.partition(b"=")[::2] for part in (folder / "environ").read_bytes().split(b"\0"))
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # gone, or of somebody else
            continue
        is_ours = environment.get(b"OPENPI_TESTS_MARK") == mark.encode() and int(folder.name) != os.getpid()
        if is_ours and command and not any(name in command for name in _OF_THIS_PROCESS):
            test = environment.get(b"PYTEST_CURRENT_TEST", b"?").decode()
            told = forked.told(int(folder.name))
            if told != "":  # the server that forks
                yield int(folder.name), f"{folder.name}: {told or f'{command[:300]} (of {test})'}"


# Of a process at the end of a file: below, it keeps what it has compiled, some of which other files run, too.
_ROOM_BYTES = 1.5 * 2**30


def _resident_bytes() -> float:
    """What this process takes; infinite where there is no `/proc`."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return float("inf")


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_forgotten():
    """They fill gigabytes; the allocator keeps what they took unless it is told."""
    yield
    if "jax" in sys.modules and _resident_bytes() > _ROOM_BYTES:
        sys.modules["jax"].clear_caches()
        gc.collect()
        gc.freeze()  # modules, mostly: looked through again after each file, they would cost half a second
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True)
def _logging_as_before():
    """For commands run in this process: they log to the standard error of the test, which ends with it."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def positronic(monkeypatch):
    """Runs an installed command of `openpi-positronic` in this process; returns its exit code."""

    def call(program: str, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        (command,) = metadata.entry_points(group="console_scripts", name=program)
        try:
            command.load()()
        except SystemExit as end:
            return end.code or 0
        return 0

    return call


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An S3 server of this machine, which it may write to: its client, the name of an empty bucket, its URL."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("OPENPI_DATA_HOME", str(tmp_path / "cache")),
        ("OPENPI_OFFLINE", "0"),
    ):
        monkeypatch.setenv(name, value)
    s3 = s3fs.S3FileSystem(endpoint_url=url)
    name = f"lab-{tmp_path.name.replace('_', '-')[-40:].strip('-')}"  # the server's memory outlives it
    s3.mkdir(name)
    yield s3, name, url
    server.stop()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of recorded reference data (see tests/golden/README.md)."""
    return GOLDEN


@pytest.fixture(scope="session")
def arm_dataset(tmp_path_factory) -> Path:
    """A real dataset of four episodes: a camera, three joints, two tasks."""
    from openpi.data.lerobot.writer import LeRobotWriter  # after the import hook

    features = {
        "front": {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channel"]},
        "joints": {"dtype": "float32", "shape": (3,), "names": ["lift", "turn", "grip"]},
        "actions": {"dtype": "float32", "shape": (3,), "names": ["lift", "turn", "grip"]},
    }
    folder = tmp_path_factory.mktemp("arm") / "dataset"
    rng = np.random.default_rng(0)
    with LeRobotWriter(folder, fps=10, features=features, robot_type="arm") as writer:
        for episode in range(4):
            joints = rng.normal(size=(10, 3)).cumsum(axis=0).astype(np.float32)
            images = rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
            frames = {"front": images, "joints": joints, "actions": joints + 1}
            writer.add_episode(frames, task=("pick up the cube", "put it down")[episode % 2])
    return folder
