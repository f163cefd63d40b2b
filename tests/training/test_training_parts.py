"""The parts of the loop on their own: metrics on disk, batches ahead of time, what is shown, what is refused."""

import collections
import dataclasses
import importlib.util
import json
import logging
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import paths
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.policies.policy import Policy
from openpi.serving.warm_up import warm_up
from openpi.shared import normalize
from openpi.training import loop
from openpi.training.backend import STEPS_IN_FLIGHT, open_backend
from openpi.training.backends.jax.backend import JaxBackend
from openpi.training.checkpoints import complete_steps
from openpi.training.config import AssetsConfig, TrainConfig, cli, get_config
from openpi.training.data import training_data
from openpi.training.data.prefetch import Prefetcher
from openpi.training.data.recipe_data import open_recipe
from openpi.training.data_config import DataConfig, repack
from openpi.training.freeze import freeze_nothing
from openpi.training.run import interrupts as interrupts_module
from openpi.training.run import preflight, run_directory, tracking
from openpi.training.run.interrupts import Interrupts, StoppedError
from openpi.training.run.pictures import contact_sheet
from openpi.training.run.progress import Stopwatch, Window
from openpi.training.run.tracking import MetricsFile, TensorBoardObserver
from openpi.training.run.validation import Validation
from tiny_recipe import ArmInputs, InputsAsRecorded, OtherArmData

RECIPE = f"{paths.SUPPORT / 'tiny_recipe.py'}:tiny"


class CountingLoader:
    """Batches 0, 1, 2, ...; fails at `fails_at`."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.count = 0
        self.fails_at = fails_at

    def __iter__(self):
        while True:
            if self.count == self.fails_at:
                raise OSError("the disk is gone")
            self.count += 1
            yield {"x": np.asarray(self.count - 1)}

    def state(self):
        return {"next": self.count}


def test_batches_come_in_order_with_the_state_of_the_batch_returned():
    batches = Prefetcher(CountingLoader(), lambda batch, step: (batch["x"] * 10, step), first=7)
    try:
        assert batches.state == {"next": 0}
        assert [next(batches) for _ in range(5)] == [(0, 7), (10, 8), (20, 9), (30, 10), (40, 11)]
        assert batches.state == {"next": 5}  # although the thread is further
    finally:
        batches.close()


def test_an_error_of_the_loader_surfaces_where_its_batch_was_due():
    batches = Prefetcher(CountingLoader(fails_at=2), lambda batch, step: batch)
    assert [int(next(batches)["x"]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    batches.close()


def test_closing_ends_the_thread_in_the_middle_of_the_data():
    batches = Prefetcher(CountingLoader(), lambda batch, step: batch)
    next(batches)
    batches.close()
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_resuming_drops_metrics_that_will_be_written_anew(tmp_path):
    first = MetricsFile(tmp_path, start=0)
    for step in range(4):
        first.log(step, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # of a process that was killed
    second = MetricsFile(tmp_path, start=2)
    second.log(2, {"loss": 20.0})
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 0.0), (1, 1.0), (2, 20.0)]
    MetricsFile(tmp_path, start=0).close()  # it had no checkpoint yet
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_starts_within_a_second_have_files_of_their_own_in_tensorboard(tmp_path, monkeypatch):
    tensorboardx = pytest.importorskip("tensorboardX")
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.5)
    for start in (0, 2):
        observer = TensorBoardObserver(tensorboardx, tmp_path, start=start)
        observer.log(start, {"loss": 1.0})
        observer.close()
    first, second = sorted(tmp_path.rglob("events.*"))
    assert first.stat().st_size and second.stat().st_size


@pytest.mark.parametrize(
    ("field", "module", "extra"),
    [("wandb_enabled", "wandb", "wandb"), ("tensorboard_enabled", "tensorboardX", "tensorboard")],
)
def test_a_tracker_that_is_asked_for_and_not_installed_is_refused_at_the_start(field, module, extra, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    config = dataclasses.replace(get_config(RECIPE), exp_name="x", **{field: True})
    with pytest.raises(ImportError, match=rf"{module} is not installed; .*--extra {extra}.*--no-"):
        preflight.check_recipe(config, open_backend(config))


class Spoilt:
    """A tracker whose service is gone."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def log(self, step: int, metrics: object) -> None:
        self.calls.append("log")
        raise ConnectionError("the network is gone")

    def image(self, step: int, name: str, image: object) -> None:
        self.calls.append("image")
        raise ConnectionError("the network is gone")

    def close(self) -> None:
        self.calls.append("close")
        raise ConnectionError("the network is gone")

    def __str__(self) -> str:
        return "the tracker"


def test_a_tracker_that_fails_costs_no_run_and_the_others_no_number(tmp_path, caplog):
    spoilt = Spoilt()
    observers = tracking.Observers([spoilt, MetricsFile(tmp_path, start=0)])
    observers.log(0, {"loss": 1.0})
    observers.image(0, "first_batch", np.zeros((2, 2, 3), np.uint8))
    observers.log(1, {"loss": 0.5})
    observers.close()
    assert spoilt.calls == ["log", "image", "log", "close"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert caplog.text.count("the tracker lacks numbers of the run from here on: the network is gone") == 1


def window_of(done: list | None = None) -> Window:
    """Notes the metrics that it has waited for."""
    return Window((done if done is not None else []).append)


def test_the_host_is_a_few_steps_ahead_of_the_device_and_no_more():
    done: list = []
    window = window_of(done)
    for step in range(6):
        window.add({"loss": step})
        assert len(done) == max(0, step + 1 - STEPS_IN_FLIGHT)
    assert [metrics["loss"] for metrics in done] == [0, 1, 2, 3]
    window.means()
    window.add({"loss": 6})
    assert done[-1]["loss"] == 4  # across reports, too


def test_a_window_reports_means_and_starts_anew():
    window = window_of()
    for loss in (1.0, 2.0, 6.0):
        window.add({"loss": np.float32(loss)})
    assert window.means() == {"loss": 3.0}
    assert window.means() == {}


def test_a_restored_window_reports_as_if_it_had_never_stopped():
    window, resumed = window_of(), window_of()
    window.add({"loss": np.float32(0.1)})
    resumed.restore(json.loads(json.dumps(window.values())))
    for either in (window, resumed):
        either.add({"loss": np.float32(0.7)})
    assert resumed.means() == window.means()


def test_waiting_for_data_is_reported_as_a_share():
    stopwatch = Stopwatch()
    rates = stopwatch.read(samples=10, waited_s=0.0)
    assert rates["data_wait"] == 0
    assert rates["samples_per_s"] > 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_a_later_one_acts(signum, monkeypatch):
    acted = []
    before = signal.signal(signum, lambda number, frame: acted.append(number))
    try:
        usual = signal.getsignal(signum)
        with Interrupts() as interrupts:
            assert interrupts.signum is None
            signal.raise_signal(signum)
            assert interrupts.signum == signum
            monkeypatch.setattr(interrupts_module, "_IMPATIENCE_S", 1000)
            signal.raise_signal(signum)  # passed on by a launcher
            assert acted == []
            monkeypatch.setattr(interrupts_module, "_IMPATIENCE_S", -1)
            signal.raise_signal(signum)
            assert acted == [signum] and signal.getsignal(signum) is usual
        assert signal.getsignal(signum) is usual
    finally:
        signal.signal(signum, before)


def test_a_signal_before_the_first_step_ends_the_run_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError) as stopped, Interrupts(may_leave_at_once=True):
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.signum == signal.SIGTERM
    with Interrupts(may_leave_at_once=True) as interrupts:
        interrupts.expect_steps()
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_what_a_shell_ignores_in_the_background_stays_ignored(signum):
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signum)
            assert interrupts.signum is None
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_a_queue_s_warning_and_a_lost_terminal_are_requests_too_unless_somebody_else_takes_them(monkeypatch):
    taken = []
    before = [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGHUP, signal.SIGUSR1)]
    other = signal.signal(signal.SIGUSR2, lambda number, frame: taken.append(number))
    try:
        for signum in (signal.SIGHUP, signal.SIGUSR1):
            with Interrupts() as interrupts:
                signal.raise_signal(signal.SIGUSR2)
                signal.raise_signal(signum)
                assert interrupts.signum == signum
                monkeypatch.setattr(interrupts_module, "_IMPATIENCE_S", -1)
                signal.raise_signal(signum)
                signal.raise_signal(signal.SIGTERM)  # when the time is over: it may still be saving
                assert interrupts.signum == signal.SIGTERM
        assert taken == [signal.SIGUSR2] * 2
    finally:
        for signum, handler in zip((signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2), (*before, other), strict=True):
            signal.signal(signum, handler)


def test_waiting_for_a_batch_that_does_not_come_can_be_given_up():
    may_come, has_asked = threading.Event(), threading.Event()

    class Stuck(CountingLoader):
        def __iter__(self):
            may_come.wait()
            yield from super().__iter__()

    batches = Prefetcher(Stuck(), lambda batch, step: batch)
    assert not batches.wait_for(1, may_give_up=lambda: has_asked.is_set() or has_asked.set())
    may_come.set()
    assert batches.wait_for(2)
    batches.close()


def test_the_sheet_shows_every_camera_in_its_place_and_brightness():
    white, grey = np.ones((2, 20, 120, 3), np.float32), np.full((2, 20, 120, 3), 128, np.uint8)
    batch = {
        "image": {"left": white, "right": grey},
        "image_mask": {"left": np.ones(2, bool), "right": np.asarray([True, False])},
    }
    sheet = contact_sheet(batch)
    assert sheet.dtype == np.uint8
    assert (sheet == 128).all(axis=-1).sum() == 2 * 20 * 120
    black = contact_sheet({**batch, "image": {"left": -white, "right": grey}})
    assert (black == 0).all(axis=-1).sum() >= 2 * 20 * 120


class Evaluating:
    """Of a backend what a validation uses."""

    def __init__(self) -> None:
        self.num_batches = 0

    def evaluate(self, state: object, batch: dict, index: int) -> tuple[float, np.ndarray]:
        self.num_batches += 1
        return 0.0, np.zeros_like(batch["actions"])


def test_a_run_that_is_to_stop_does_not_finish_its_validation(arm_dataset, tmp_path):
    config = dataclasses.replace(of_arm("arm", arm_dataset, tmp_path), holdout_episodes=2, batch_size=4)
    backend: Any = Evaluating()
    validate = Validation(config, open_data(config), backend, lambda: backend.num_batches == 2)
    assert validate("the state") == {}
    assert backend.num_batches == 2
    backend.num_batches = 10
    assert validate("the state")["validation_loss"] == 0.0


def check_recipe(config: TrainConfig) -> None:
    preflight.check_recipe(config, open_backend(config))


def open_data(config: TrainConfig) -> training_data.TrainingData:
    return training_data.prepare(config, open_recipe(config), num_devices=1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pi0_aloha", {}, r"has no dataset: it serves a released checkpoint"),
        ("pi05_droid_finetune", {}, r"data\.repo_id='your_hf_username.*is a placeholder.*--data\.repo-id"),
        ("pi05_full_droid_finetune", {}, r"data\.rlds_data_dir='<path_to.*is a placeholder"),
        ("debug", {"exp_name": ""}, r"exp_name is empty"),
    ],
)
def test_recipes_that_cannot_train_are_refused_at_once(name, change, message):
    config = dataclasses.replace(get_config(name), **{"exp_name": "x", **change})
    with pytest.raises(ValueError, match=message):
        check_recipe(config)


def of_arm(name: str, dataset: Path, folder: Path) -> TrainConfig:
    config = get_config(f"{RECIPE.removesuffix(':tiny')}:{name}")
    data = dataclasses.replace(config.data, repo_id=str(dataset))
    return dataclasses.replace(config, data=data, assets_base_dir=str(folder), exp_name="x")


def test_training_says_what_is_wrong_in_the_columns_of_a_dataset_and_goes_on(tmp_path, caplog):
    vector = {"dtype": "float32", "shape": (3,), "names": ["lift", "turn", "grip"]}
    camera = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channel"]}
    features = {"front": camera, "joints": vector, "actions": vector}
    with LeRobotWriter(tmp_path / "arm", fps=10, features=features) as writer:
        for n in (12, 3):
            path = np.linspace(0, 1, 3 * n, dtype=np.float32).reshape(n, 3)
            frames = {"front": np.zeros((n, 32, 32, 3), np.uint8), "joints": path, "actions": path + 1}
            writer.add_episode(frames, "lift it")
    open_data(of_arm("as_recorded", tmp_path / "arm", tmp_path))
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("dataset: episodes.too-short")]
    assert len(told) == 1 and "episode 1" in told[0] and "--data.exclude-episodes 1" in told[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wider_state", r"'joints' has shape \(3,\); expected \(4,\): joint_0, joint_1"),
        ("fewer_actions", r"the actions of .* have 3 dimensions; robot 'arm_of_3_and_2' of the recipe has 2: joint_0"),
        ("padding_returned", r"the output transforms return 4 dimensions; robot 'arm_of_3_and_3' of the recipe has 3"),
    ],
)
def test_a_robot_that_is_not_the_one_of_the_dataset_is_refused(name, message, arm_dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_data(of_arm(name, arm_dataset, tmp_path))


def test_outputs_of_ones_own_may_make_other_actions_and_the_widths_are_told(arm_dataset, tmp_path, caplog):
    """Such as angles for a rotation matrix: as published, that is for whoever wrote them."""
    assert open_data(of_arm("dimension_lost", arm_dataset, tmp_path)).contract.actions.width == 2
    assert "have 3 dimensions, and robots are given 2" in caplog.text


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        (lambda data: {"joint_actions": data["actions"]}, "KeyError: 'actions'"),
        (lambda data: {"actions": {"left": data["actions"]}}, r"shape \[\] and dtype object"),
        (lambda data: {"actions": data["actions"][0]}, r"shape \[4\]"),
        (lambda data: {"actions": data["of_the_robot"]}, "KeyError: 'of_the_robot'"),
    ],
)
def test_outputs_of_any_form_train_without_a_contract(outputs, told, arm_dataset, tmp_path, caplog):
    """A KeyError or IndexError ended the start of a run."""
    config = of_arm("arm", arm_dataset, tmp_path)
    data = OtherArmData(str(arm_dataset), base_config=config.data.base_config, inputs=ArmInputs(), outputs=outputs)
    config = dataclasses.replace(config, data=data, holdout_episodes=2, batch_size=4)
    prepared = open_data(config)
    assert prepared.contract is None and re.search(rf"do not give 'actions'.*{told}", caplog.text)
    backend: Any = Evaluating()
    assert Validation(config, prepared, backend)("the state") == {"validation_loss": 0.0}


@dataclasses.dataclass(frozen=True)
class OfParts(OtherArmData):
    """Actions in a map, as those of several columns, and more than the inputs read, as of a copied repack transform."""

    def create(self, assets_dirs: Path, model_config: Any) -> DataConfig:
        structure = {
            "camera": "front",
            "images": {"second": "front", "joints": "front"},
            "joints": "joints",
            "measured": {"speed": "joints"},
            "actions": {"arm": "actions", "number": "frame_index"},
            "prompt": "prompt",
        }
        return dataclasses.replace(super().create(assets_dirs, model_config), repack_transforms=repack(structure))


@dataclasses.dataclass(frozen=True)
class InputsOfParts(ArmInputs):
    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        whole = {"actions": data["actions"]["arm"]} if "actions" in data else {}
        return super().__call__({**data, **whole})


def test_robots_need_not_send_what_the_inputs_do_not_read(arm_dataset, tmp_path):
    """Where there is no spec, all that a repack transform mentions was asked of them; and actions in a map ended the
    start of a run, or were asked of them, too.
    """
    config = of_arm("arm", arm_dataset, tmp_path)
    data = OfParts(str(arm_dataset), base_config=config.data.base_config, inputs=InputsOfParts())
    contract = open_data(dataclasses.replace(config, data=data)).contract
    assert contract is not None and contract.actions.names == ("lift", "turn", "grip")
    assert [camera.key for camera in contract.cameras] == ["camera"]
    assert [vector.key for vector in contract.state] == ["joints"]
    contract.check({"camera": np.zeros((32, 32, 3), np.uint8), "joints": np.zeros(3), "prompt": "lift it"})


def test_the_actions_of_a_robot_without_a_spec_are_those_that_its_outputs_return(arm_dataset, tmp_path):
    """Inputs that pad, as published robots of one's own did, were refused: "the output transforms return 3"."""
    data = open_data(of_arm("padded_inputs", arm_dataset, tmp_path))
    assert data.config.norm_stats["actions"].width == 4
    assert data.contract.actions.names == data.action_names == ("lift", "turn", "grip")
    assert len(data.contract.action_low) == 3 and data.contract.stats_widths == {"state": 4, "actions": 4}


@pytest.mark.parametrize("name", ["arm", "as_recorded"])
def test_statistics_of_a_released_base_which_are_as_wide_as_the_model_are_trained_with(name, arm_dataset, tmp_path):
    """With zeros for the padding. They were refused while the dataset was looked at."""
    config = of_arm(name, arm_dataset, tmp_path)
    widened = {
        key: normalize.NormStats(*(np.append(values, 0.0) for values in (own.mean, own.std, own.q01, own.q99)))
        for key, own in open_data(config).config.norm_stats.items()
    }
    normalize.save(tmp_path / "base" / "arms", widened)
    assets = AssetsConfig(assets_dir=str(tmp_path / "base"), asset_id="arms")
    data = open_data(dataclasses.replace(config, data=dataclasses.replace(config.data, assets=assets)))
    assert data.config.norm_stats["state"].width == 4 and data.contract.seen is not None


def test_transforms_without_a_spec_get_images_as_published_and_robots_of_either_layout_are_warmed_up(
    arm_dataset, tmp_path, caplog
):
    """[64, 3, 48] reached the model from copies of the published `aloha_policy.py`, and training refused them."""
    batches = {}
    for name in ("arm", "turning_inputs", "as_recorded"):
        data = open_data(of_arm(name, arm_dataset, tmp_path))
        batches[name] = next(iter(data.train))["image"]["base_0_rgb"]
        policy = Policy(
            SimpleNamespace(takes_noise=True, warm_up=lambda batch: batches.update(warm=batch["image"]["base_0_rgb"])),
            transforms=[*data.config.data_transforms.inputs, *data.config.model_transforms.inputs],
        )
        caplog.clear()
        assert warm_up(policy, data.contract.cameras, data.contract.state), caplog.text
        assert batches.pop("warm").shape == (1, 28, 28, 3)
    assert batches["arm"].shape == (4, 28, 28, 3) and batches["arm"].dtype == np.uint8
    for name, images in batches.items():
        np.testing.assert_array_equal(images, batches["arm"], err_msg=name)


@pytest.mark.parametrize("column", ["joints", "actions"])
def test_the_names_of_the_dataset_in_another_order_are_refused(column, tmp_path):
    """The contract named one joint, and the statistics were those of the other."""
    features = {
        key: {"dtype": "float32", "shape": (3,), "names": ["joint_0", "joint_1", "joint_2"]}
        for key in ("joints", "actions")
    }
    features[column]["names"] = ["joint_1", "joint_0", "joint_2"]
    camera = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channel"]}
    with LeRobotWriter(tmp_path / "arm", fps=10, features={"front": camera, **features}) as writer:
        path = np.linspace(0, 1, 36, dtype=np.float32).reshape(12, 3)
        frames = {"front": np.zeros((12, 32, 32, 3), np.uint8), "joints": path, "actions": path + 1}
        writer.add_episode(frames, "lift it")
    with pytest.raises(
        ValueError, match=rf"'{column}' of the recipe.*joint_0, joint_1.*is joint_1, joint_0.*another ord"
    ):
        open_data(of_arm("as_recorded", tmp_path / "arm", tmp_path))


def write_arm(folder: Path, scale: float = 1.0, *, episodes: int = 1, dtype: type = np.float32) -> Path:
    """Episodes of 24 frames for `of_arm`, in place of what is there."""
    vector = {"dtype": "float32", "shape": (3,), "names": ["lift", "turn", "grip"]}
    camera = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channel"]}
    features = {"front": camera, "joints": vector, "actions": {**vector, "dtype": np.dtype(dtype).name}}
    with LeRobotWriter(folder, fps=10, features=features, overwrite=True) as writer:
        for number in range(episodes):
            path = scale * np.sin(number + np.arange(72, dtype=np.float32)).reshape(24, 3)
            frames = {"front": np.zeros((24, 32, 32, 3), np.uint8), "joints": path, "actions": (path > 0).astype(dtype)}
            writer.add_episode(frames, "lift it")
    return folder


def test_a_dataset_whose_numbers_have_changed_is_told_when_a_run_is_resumed(tmp_path, caplog):
    """All in degrees, in as many frames: nothing but a loss of 388 said so."""
    write_arm(tmp_path / "arm")
    config = of_arm("as_recorded", tmp_path / "arm", tmp_path)
    config = dataclasses.replace(
        config, checkpoint_base_dir=str(tmp_path / "runs"), num_train_steps=2, holdout_episodes=0
    )
    loop.train(config)
    for scale, is_told in ((1.0, False), (1.5, True)):
        write_arm(tmp_path / "arm", scale)
        config = dataclasses.replace(config, num_train_steps=config.num_train_steps + 1, resume=True)
        caplog.clear()
        loop.train(config)
        assert ("are others than when" in caplog.text) is is_told


def test_datasets_of_one_name_do_not_share_statistics_unasked(tmp_path, caplog):
    """Folders n1/set and n2/set: the second trained on the first's statistics, without a word."""
    first, second = (write_arm(tmp_path / name / "set", scale) for name, scale in (("n1", 1.0), ("n2", 0.05)))
    open_data(of_arm("as_recorded", first, tmp_path))
    with pytest.raises(ValueError, match=r"n1/set', and the recipe reads .*n2/set', with other numbers.*asset-id"):
        open_data(of_arm("as_recorded", second, tmp_path))
    chosen = AssetsConfig(assets_dir=str(tmp_path / "arm"), asset_id="set")
    other = dataclasses.replace(of_arm("as_recorded", second, tmp_path), name="goes_on_from_it")
    told = open_data(dataclasses.replace(other, data=dataclasses.replace(other.data, assets=chosen))).config.norm_stats
    assert told == normalize.load(tmp_path / "arm" / "set") and "so it trains with them" in caplog.text
    moved = shutil.move(first, tmp_path / "n3" / "set")
    open_data(of_arm("as_recorded", Path(moved), tmp_path))


class InUnitsOfItsOwn(InputsAsRecorded):
    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {**super().__call__(data), "state": np.asarray(data["joints"], np.float32) * 1.01}


@pytest.mark.parametrize("change", ["numbers", "more episodes", "transforms"])
def test_statistics_that_are_older_than_the_data_or_the_transforms_are_told(change, tmp_path, caplog):
    folder = write_arm(tmp_path / "set", episodes=40)
    config = of_arm("as_recorded", folder, tmp_path)
    open_data(config)
    caplog.clear()
    open_data(config)
    assert "computed before the data changed" not in caplog.text
    match change:
        case "numbers":
            write_arm(folder, 1.01, episodes=40)
        case "more episodes":
            write_arm(folder, episodes=44)
        case "transforms":
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, inputs=InUnitsOfItsOwn()))
    open_data(config)
    assert "computed before the data changed" in caplog.text


def test_what_a_grown_dataset_is_validated_on_was_not_trained_on_or_is_told(tmp_path, caplog):
    config = of_arm("as_recorded", write_arm(tmp_path / "set", episodes=20), tmp_path)
    config = dataclasses.replace(config, checkpoint_base_dir=str(tmp_path / "runs"), num_train_steps=2)
    for held, is_told in ((2, False), (0.1, True)):
        write_arm(tmp_path / "set", episodes=20)
        config = dataclasses.replace(config, exp_name=f"holds_out_{held}", holdout_episodes=held)
        loop.train(config)
        write_arm(tmp_path / "set", episodes=40)
        caplog.clear()
        loop.train(dataclasses.replace(config, num_train_steps=3, resume=True))
        found = [r.getMessage() for r in caplog.records if "held out are now also" in r.getMessage()]
        assert bool(found) is is_told
    assert len(found[0].partition("--data.validation-episodes ")[2].split()) == 2


def test_actions_that_are_true_or_false_are_numbers(tmp_path):
    open_data(of_arm("as_recorded", write_arm(tmp_path / "arm", dtype=np.bool_), tmp_path))


def test_a_run_is_replaced_by_one_that_can_start_and_by_no_other(tmp_path):
    config = of_arm("as_recorded", write_arm(tmp_path / "data"), tmp_path)
    config = dataclasses.replace(config, checkpoint_base_dir=str(tmp_path / "runs"), num_train_steps=2)
    loop.train(dataclasses.replace(config, holdout_episodes=0))
    again = dataclasses.replace(config, holdout_episodes=0, overwrite=True)
    for changes in ({"batch_size": 4000}, {"num_train_steps": 3, "batch_size": 1}):
        before = complete_steps(config.checkpoint_dir)
        assert before == [1]
        if changes["batch_size"] > 1:
            with pytest.raises(ValueError, match="batch_size is 4000"):
                loop.train(dataclasses.replace(again, **changes))
        else:
            loop.train(dataclasses.replace(again, **changes))
    assert complete_steps(config.checkpoint_dir) == [2]


def test_a_run_that_goes_on_with_another_dataset_keeps_its_statistics(tmp_path, caplog):
    config = of_arm("as_recorded", write_arm(tmp_path / "small"), tmp_path)
    config = dataclasses.replace(
        config, checkpoint_base_dir=str(tmp_path / "runs"), num_train_steps=2, holdout_episodes=0
    )
    loop.train(config)
    other = dataclasses.replace(config.data, repo_id=str(write_arm(tmp_path / "big", 3.0)))
    loop.train(dataclasses.replace(config, data=other, num_train_steps=3, resume=True))
    assert "was trained with the statistics of 'small'" in caplog.text
    steps = [config.checkpoint_dir / str(step) for step in (1, 2)]
    found = [
        normalize.load(next(step.joinpath("assets").rglob("norm_stats.json")).parent) for step in steps if step.exists()
    ]
    assert np.allclose(found[-1]["state"].std, np.sin(np.arange(72)).reshape(24, 3).std(axis=0), rtol=0.05)


def test_folders_of_runs_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = dataclasses.replace(get_config("debug"), exp_name="x", checkpoint_base_dir="~/ck", assets_base_dir="~/as")
    assert config.checkpoint_dir.is_relative_to(tmp_path / "ck") and config.assets_dirs.is_relative_to(tmp_path / "as")


def test_statistics_of_another_robot_are_refused(arm_dataset, tmp_path):
    config = of_arm("as_recorded", arm_dataset, tmp_path)
    open_data(config)
    folder = Path(str(config.data.stats_dir(config.assets_dirs)))
    stats = normalize.load(folder)
    six = normalize.NormStats(*(np.arange(6.0) + i for i in range(4)))
    normalize.save(folder, {**stats, "actions": six})
    with pytest.raises(ValueError, match="'actions' has 6 dimensions; expected 3: it is of another robot"):
        open_data(config)


def test_the_robot_of_the_dataset_keeps_its_own_names(arm_dataset, tmp_path):
    contract = open_data(of_arm("as_recorded", arm_dataset, tmp_path)).contract
    assert contract is not None
    assert contract.state_names == contract.actions.names == ("joint_0", "joint_1", "joint_2")


def test_the_contract_has_the_range_and_the_speed_of_the_recorded_actions(arm_dataset, tmp_path):
    contract = open_data(of_arm("as_recorded", arm_dataset, tmp_path)).contract
    actions = LeRobotDataset(arm_dataset).column("actions")
    assert contract is not None and contract.action_low is not None and contract.action_max_step is not None
    assert (np.array(contract.action_low) <= actions.min(0)).all()
    assert (np.array(contract.action_high) >= actions.max(0)).all()
    assert np.isfinite(contract.action_max_step).all() and min(contract.action_max_step) > 0


def test_a_recipe_that_freezes_everything_is_refused():
    with pytest.raises(ValueError, match="freezes every parameter"):
        check_recipe(dataclasses.replace(get_config(RECIPE), exp_name="x", freeze_filter=_everything))


def test_a_recipe_that_no_checkpoint_could_hold_is_refused_before_it_trains():
    part = "llm"
    config = dataclasses.replace(get_config(RECIPE), exp_name="x", freeze_filter=lambda path: part in path)
    with pytest.raises(ValueError, match=r"config\.freeze_filter holds .*<lambda>, which has no import path"):
        check_recipe(config)


def _everything(path: str) -> bool:
    del path
    return True


def test_averaging_of_frozen_weights_is_warned_of(caplog):
    config = get_config("pi0_libero_low_mem_finetune")
    with caplog.at_level(logging.WARNING, logger="openpi"):
        check_recipe(dataclasses.replace(config, exp_name="x"))
        assert "second copy" not in caplog.text
        check_recipe(dataclasses.replace(config, exp_name="x", ema_decay=0.99))
    assert "keeps a second copy of all weights" in caplog.text


def test_a_start_expands_the_recipe_once_and_opens_its_data_once(arm_dataset, tmp_path, monkeypatch):
    """The statistics, an automatic hold-out, the contract, both loaders: of one reading."""
    calls = collections.Counter()

    def count(owner: type, name: str) -> None:
        true = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls[f"{owner.__name__}.{name}"] += 1
            return true(*args, **options)

        monkeypatch.setattr(owner, name, staticmethod(counted) if name == "load" else counted)

    config = of_arm("arm", arm_dataset, tmp_path)
    config = dataclasses.replace(config, holdout_episodes=None, checkpoint_base_dir=str(tmp_path / "runs"))
    count(type(config.data), "create")
    count(LeRobotMetadata, "load")
    count(LeRobotDataset, "__init__")

    def full(backend: object, weights: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(JaxBackend, "create_state", full)
    opened = {"LeRobotDataset.__init__": 1, "LeRobotMetadata.load": 1}
    # What statistics are computed for is expanded again with them: its transforms may depend on them.
    for number_expanded in (2, 1):
        with pytest.raises(OSError, match="full"):
            loop.train(config)
        assert calls == {"ArmData.create": number_expanded, **opened}
        calls.clear()
    assert list(tmp_path.rglob("norm_stats.json"))


def test_a_full_disk_is_noticed_before_training(tmp_path):
    config = dataclasses.replace(get_config("debug"), exp_name="x", checkpoint_base_dir=str(tmp_path))
    config.checkpoint_dir.mkdir(parents=True)
    needed = open_backend(config).required_bytes(freeze_nothing)
    run_directory.check_disk_space(config, needed)
    with pytest.raises(OSError, match=r"a checkpoint takes up to .* GB, and only .* GB are free"):
        run_directory.check_disk_space(config, needed * 10**9)


@pytest.mark.parametrize("backend", ["jax", "pytorch"])
def test_a_state_that_is_larger_than_the_device_is_told_before_weights_are_read(monkeypatch, caplog, backend):
    config = dataclasses.replace(get_config("debug"), exp_name="x", backend=backend)
    opened = open_backend(config)
    preflight.check_recipe(config, opened)
    assert "lack of memory" not in caplog.text
    monkeypatch.setattr(preflight, "_host_bytes", lambda: 10**6)
    preflight.check_recipe(config, opened)
    assert "GB on each device, which has 0.0 GB" in caplog.text and "openpi train debug --plan" in caplog.text


def test_a_backend_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    config = cli([RECIPE, "--backend=pytorch"])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"backend=pytorch needs PyTorch; .*--extra torch"):
        open_backend(config)


def of_run(folder: Path, name: str, **changes) -> TrainConfig:
    config = dataclasses.replace(get_config(RECIPE), checkpoint_base_dir=str(folder), exp_name=name, resume=True)
    return dataclasses.replace(config, **changes)


def finished(config: TrainConfig, step: int) -> None:
    """Leaves what a complete checkpoint is recognised by."""
    for item in ("params", "train_state"):
        (config.checkpoint_dir / str(step) / item).mkdir(parents=True)
        (config.checkpoint_dir / str(step) / item / "_METADATA").touch()


def test_a_run_that_is_not_there_starts_anew_and_those_that_are_get_listed(tmp_path, caplog):
    finished(of_run(tmp_path, "first"), 3)
    checkpoints, last_step = run_directory.open_run(of_run(tmp_path, "frist"))
    checkpoints.close()
    assert last_step is None
    assert "starts anew; runs with checkpoints: first" in caplog.text


def test_checkpoints_of_both_frameworks_are_recognised_by_their_weights(tmp_path):
    for name in ("1/params/_METADATA", "3/model.safetensors", "4/params/unfinished", "x/model.safetensors"):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.touch()
    assert complete_steps(tmp_path) == [1, 3]


def test_a_complete_run_says_that_nothing_is_left_to_do(tmp_path, caplog):
    config = of_run(tmp_path, "first")
    finished(config, config.num_train_steps - 1)
    checkpoints, last_step = run_directory.open_run(config)
    checkpoints.close()
    assert last_step == config.num_train_steps - 1
    assert "nothing is left to do. Raise --num-train-steps" in caplog.text


def test_a_run_that_is_replaced_is_named_with_its_last_step(tmp_path, caplog):
    caplog.set_level("INFO")
    config = of_run(tmp_path, "first", resume=False, overwrite=True)
    run_directory.open_run(config)[0].close()
    assert "replacing" not in caplog.text
    finished(config, 3)
    run_directory.open_run(config)[0].close()
    assert complete_steps(config.checkpoint_dir) == [3]  # until nothing can stop the new one
    run_directory.replace(config.checkpoint_dir)
    assert f"replacing the run in {config.checkpoint_dir} (step 3)" in caplog.text
    assert complete_steps(config.checkpoint_dir) == []


@pytest.mark.parametrize("name", ["..", ".", "../..", "first/../..", "/", "a//b", "a\\..\\..", "a\nb"])
def test_a_run_cannot_be_named_out_of_its_folder(name, tmp_path):
    config = of_run(tmp_path, name, resume=False, overwrite=True)
    with pytest.raises(ValueError, match=r"exp_name is .*; expected a name for a folder below checkpoint_base_dir"):
        run_directory.open_run(config)


def test_what_is_not_one_run_is_not_overwritten(tmp_path):
    finished(of_run(tmp_path, "group/first"), 3)
    config = of_run(tmp_path, "group", resume=False, overwrite=True)
    with pytest.raises(FileExistsError, match="group holds the runs first, which --overwrite would delete; choose"):
        run_directory.open_run(config)
    notes = of_run(tmp_path, "notes", resume=False, overwrite=True)
    notes.checkpoint_dir.mkdir()
    (notes.checkpoint_dir / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"notes holds no run, but thesis\.tex, which"):
        run_directory.open_run(notes)
    assert (notes.checkpoint_dir / "thesis.tex").exists()
    assert complete_steps(config.checkpoint_dir / "first") == [3]
