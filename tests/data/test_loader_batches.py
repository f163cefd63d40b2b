"""The order of batches, workers, resuming; and the loader of a recipe."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paths
from openpi import transforms
from openpi.data import batch_loader
from openpi.data.batch_loader import BatchLoader, LoaderClosedError, has_stuck_threads, stack
from openpi.data.batch_order import BatchOrder, Stretches
from openpi.data.dataset import Sample
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.models.pi0_config import Pi0Config
from openpi.shared.normalize import NormStats
from openpi.training import data_loader
from openpi.training.config import TrainConfig
from openpi.training.data import recipe_data
from openpi.training.data.holdout import split_episodes
from openpi.training.data_config import DataConfig, LeRobotLiberoDataConfig, SimpleDataConfig
from serving_live import until

LENGTHS = (9, 6, 14, 11)
HORIZON = 4
IMAGE = {"dtype": "image", "shape": [8, 10, 3], "names": ["height", "width", "channels"]}
FEATURES = {
    "image": IMAGE,
    "wrist_image": IMAGE,
    "state": {"dtype": "float32", "shape": [8], "names": None},
    "actions": {"dtype": "float32", "shape": [7], "names": None},
}


class Numbers:
    """Sample i is i; picklable, so that it can be sent to workers."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return {"number": np.asarray(index), "nested": {"name": f"sample {index}"}}


class Broken(Numbers):
    def __getitem__(self, index: int, /) -> dict:
        raise KeyError(f"sample {index} is broken")


class Deadly(Numbers):
    def __getitem__(self, index: int, /) -> dict:
        os._exit(1)  # as when the system runs out of memory


def take(loader, count: int) -> list[dict]:
    return list(itertools.islice(iter(loader), count))


def numbers(batches: list[dict]) -> list[list[int]]:
    return [batch["number"].tolist() for batch in batches]


# --- order --------------------------------------------------------------------------------------------------------


@given(num_samples=st.integers(1, 40), batch=st.integers(1, 40), seed=st.integers(0, 2**63 - 1), shuffle=st.booleans())
def test_an_epoch_visits_every_sample_at_most_once_and_leaves_out_less_than_a_batch(num_samples, batch, seed, shuffle):
    if batch > num_samples:
        with pytest.raises(ValueError, match=f"batch_size is {batch}, but the dataset has {num_samples} samples"):
            BatchOrder(num_samples, batch, seed=seed, shuffle=shuffle)
        return
    order = BatchOrder(num_samples, batch, seed=seed, shuffle=shuffle)
    visited = np.concatenate([order.indices(i) for i in range(order.batches_per_epoch)])
    assert len(visited) == len(set(visited.tolist())) > num_samples - batch
    assert set(visited.tolist()) <= set(range(num_samples))


def test_epochs_are_shuffled_differently_and_seeds_too():
    orders = {
        tuple(BatchOrder(100, 100, seed=seed, shuffle=True).indices(epoch)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_batches_may_be_asked_for_in_any_order():
    forward, backward = (BatchOrder(10, 3, seed=5, shuffle=True) for _ in range(2))
    expected = [forward.indices(i) for i in range(12)]
    for i in reversed(range(12)):
        np.testing.assert_array_equal(backward.indices(i), expected[i])


def test_parts_of_a_distributed_run_make_up_the_global_batch():
    whole = numbers(take(BatchLoader(Numbers(20), batch_size=6), 5))
    parts = [numbers(take(BatchLoader(Numbers(20), batch_size=6, part=(i, 3)), 5)) for i in range(3)]
    assert [list(itertools.chain(*pieces)) for pieces in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match="batch_size 6 is not divisible by 4 processes"):
        BatchLoader(Numbers(20), batch_size=6, part=(0, 4))


# --- workers and resuming -----------------------------------------------------------------------------------------


def test_a_loader_resumes_at_the_batch_that_would_have_come_next():
    expected = numbers(take(BatchLoader(Numbers(10), batch_size=3, seed=7), 8))
    loader = BatchLoader(Numbers(10), batch_size=3, seed=7)
    batches = iter(loader)
    assert numbers([next(batches) for _ in range(5)]) == expected[:5]
    resumed = BatchLoader(Numbers(10), batch_size=3, seed=7)
    resumed.restore(loader.state())
    assert numbers(take(resumed, 3)) == expected[5:]


def test_a_state_of_another_dataset_is_refused():
    state = BatchLoader(Numbers(10), batch_size=3, seed=7).state()
    with pytest.raises(ValueError, match=r"num_samples was 10, is 11, seed was 7, is 8"):
        BatchLoader(Numbers(11), batch_size=3, seed=8).restore(state)


def test_a_finite_loader_stops_and_begins_anew():
    loader = BatchLoader(Numbers(10), batch_size=4, num_batches=3)
    first = numbers(list(loader))
    assert len(first) == 3
    assert numbers(list(loader)) == first


BOUNDS = st.lists(st.integers(1, 30), min_size=1, max_size=6).map(
    lambda lengths: np.stack([np.cumsum([0, *lengths[:-1]]), np.cumsum(lengths)], axis=1)
)


SEED = st.integers(0)


@given(bounds=BOUNDS, length=st.integers(1, 12), per_pass=st.integers(2, 6), batch=st.integers(1, 5), seed=SEED)
def test_samples_of_a_pass_come_within_one_pool_and_every_epoch_is_a_permutation(bounds, length, per_pass, batch, seed):
    num_samples = int(bounds[-1, 1])
    batch = min(batch, num_samples)
    stretches = Stretches.of_episodes(bounds, length, per_pass)
    order = BatchOrder(num_samples, batch, seed=seed, shuffle=True, stretches=stretches)
    assert order.batches_per_pool == per_pass
    for epoch in range(2):
        drawn = order._permutation(epoch)
        assert sorted(drawn.tolist()) == list(range(num_samples))
        # ceil(n / per_pass) passes read a stretch of n samples, and a pass is in one pool, or over an edge in two.
        offset = epoch * order.batches_per_epoch % per_pass * batch
        pools = (np.argsort(drawn) + offset) // (per_pass * batch)
        for begin, end in itertools.pairwise([*stretches.begins.tolist(), num_samples]):
            passes = -(-(end - begin) // per_pass)
            assert len(set(pools[begin:end].tolist())) <= 2 * passes


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_read_in_passes_arrives_as_ordered_and_resumes_in_the_middle(num_workers):
    bounds = np.array([[0, 25], [25, 40]])
    dataset, stretches = Numbers(40), Stretches.of_episodes(bounds, 10, 4)
    options = {"batch_size": 3, "seed": 5, "num_workers": num_workers, "stretches": stretches}
    order = BatchOrder(40, 3, seed=5, shuffle=True, stretches=stretches)
    loader = BatchLoader(dataset, **options)
    with contextlib.closing(loader):
        batches = iter(loader)
        for number in range(20):  # across an epoch of 13 batches
            if number == 6:
                state = json.loads(json.dumps(loader.state()))
            assert next(batches)["number"].tolist() == order.indices(number).tolist()
    resumed = BatchLoader(dataset, **options)
    resumed.restore(state)
    with contextlib.closing(resumed):
        batches = iter(resumed)
        for number in range(6, 15):
            assert next(batches)["number"].tolist() == order.indices(number).tolist()
    with pytest.raises(ValueError, match="frames_per_pass was 4, is None"):
        BatchLoader(dataset, batch_size=3, seed=5).restore(state)


def test_a_pass_over_a_stretch_makes_its_samples_in_ascending_order():
    made = []

    class Noting(Numbers):
        def __getitem__(self, index):
            made.append(index)
            return super().__getitem__(index)

    stretches = Stretches.of_episodes(np.array([[0, 400]]), 100, 8)
    loader = BatchLoader(Noting(400), batch_size=4, stretches=stretches)
    with contextlib.closing(loader):
        next(iter(loader))
    by_thread = made[: 8 * 4]
    falls = int((np.diff(by_thread) < 0).sum())
    assert falls <= 2 * min(16, os.cpu_count() or 1)  # the parts of the threads, as they happen to be interleaved


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_sample_reaches_the_caller(num_workers):
    loader = BatchLoader(Broken(10), batch_size=2, num_workers=num_workers)
    with pytest.raises(KeyError, match=r"sample \d is broken"):
        next(iter(loader))
    loader.close()


class FromTwoArgumentsError(Exception):
    """Cannot be made again from what it says, as pickle does."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")


class Refusing(Numbers):
    def __getitem__(self, index: int, /):
        raise FromTwoArgumentsError(f"sample {index}", "no picture")


def test_an_error_that_cannot_be_sent_is_not_taken_for_a_death():
    loader = BatchLoader(Refusing(10), batch_size=2, num_workers=1)
    with pytest.raises(RuntimeError, match=r"^FromTwoArgumentsError: sample \d: no picture") as caught:
        next(iter(loader))
    loader.close()
    assert any("at sample" in note for note in caught.value.__notes__)


def test_a_worker_that_dies_is_reported_with_the_likely_reason():
    loader = BatchLoader(Deadly(10), batch_size=2, num_workers=1)
    with pytest.raises(RuntimeError, match=r"worker died .* memory ran out; use fewer workers"):
        next(iter(loader))
    loader.close()


def test_a_dataset_that_cannot_be_sent_to_workers_is_explained():
    dataset = Numbers(4)
    dataset.length = _Unpicklable(4)
    with pytest.raises(ValueError, match=r"cannot be sent to worker processes .*num_workers=0"):
        next(iter(BatchLoader(dataset, batch_size=2, num_workers=1)))


def test_a_dataset_that_workers_cannot_load_is_explained(monkeypatch):
    """As one whose class was typed into a notebook."""
    typed = type("Typed", (Numbers,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Typed", typed, raising=False)
    loader = BatchLoader(typed(4), batch_size=2, num_workers=1)
    with pytest.raises(
        RuntimeError, match=r"cannot load what it is to run: AttributeError: .*'Typed'.* top level of a file"
    ):
        next(iter(loader))
    loader.close()


class _Unpicklable(int):
    def __reduce__(self):
        raise TypeError("not this one")


class Fifo(Numbers):
    """Sample 3 is read from a pipe into which nobody writes."""

    def __init__(self, length: int, path: Path):
        super().__init__(length)
        self.path = path

    def __getitem__(self, index: int, /) -> Sample:
        if index == 3:
            self.path.read_bytes()
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_worker_that_is_stuck_is_named_and_does_not_stop_the_end(num_workers, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(batch_loader, "STUCK_AFTER_S", 0.2)
    monkeypatch.setattr(batch_loader, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(batch_loader, "_GOODBYE_S", 0.5)
    pipe = tmp_path / "video.mp4"
    os.mkfifo(pipe)
    told = threading.Event()
    caplog.handler.addFilter(lambda record: told.set() or True if "at sample 3" in record.getMessage() else True)
    loader = BatchLoader(Fifo(8, pipe), batch_size=2, shuffle=False, num_workers=num_workers, name="robot/data")
    batches = iter(loader)
    next(batches)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(next, batches)
        assert told.wait(60)
        loader.close()
        with pytest.raises(LoaderClosedError):
            second.result(timeout=60)
    assert re.search(r"worker \d+ .*process.* at sample 3 of robot/data for \d+ s", caplog.text)
    until(lambda: has_stuck_threads() == (num_workers == 0))  # a thread cannot be killed
    if num_workers == 0:
        with pipe.open("wb"):
            pass
    assert numbers(take(BatchLoader(Numbers(8), batch_size=2, shuffle=False), 1)) == [[0, 1]]


ORPHANS = """
import multiprocessing, sys, time
from test_loader_batches import Numbers
from openpi.data.batch_loader import BatchLoader
if __name__ == "__main__":
    next(iter(BatchLoader(Numbers(8), batch_size=2, num_workers=1)))
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{paths.SUPPORT}"}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert workers
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


def test_samples_are_stacked_leaf_by_leaf_and_must_agree():
    batch = stack([Numbers(9)[1], Numbers(9)[2]])
    assert batch["number"].tolist() == [1, 2]
    assert batch["nested"]["name"].tolist() == ["sample 1", "sample 2"]
    with pytest.raises(ValueError, match="'b' is only in some"):
        stack([{"a": 1, "b": 2}, {"a": 1}])
    with pytest.raises(ValueError, match=r"shape of 'a': \[\(2,\), \(3,\)\]"):
        stack([{"a": np.zeros(2)}, {"a": np.zeros(3)}])


# --- the loader of a recipe ---------------------------------------------------------------------------------------


def keep_model_keys(sample: dict) -> dict:
    return {key: value for key, value in sample.items() if key != "prompt"}


def recipe(tmp_path: Path, **options) -> TrainConfig:
    """LIBERO conventions on a small dataset; everything but tokens, whose vocabulary would have to be downloaded."""
    root = tmp_path / "set"
    if not root.exists():
        rng = np.random.default_rng(0)
        with LeRobotWriter(root, fps=10, features=FEATURES) as writer:
            for number, length in enumerate(LENGTHS):
                images = rng.integers(0, 256, (length, 8, 10, 3), dtype=np.uint8)
                state = np.full((length, 8), number, np.float32)
                actions = np.arange(length * 7, dtype=np.float32).reshape(length, 7)
                episode = {"image": images, "wrist_image": images, "state": state, "actions": actions}
                writer.add_episode(episode, f"task {number}")
    data = LiberoWithoutTokens(repo_id=str(root), base_config=DataConfig(prompt_from_task=True))
    model = Pi0Config(action_horizon=HORIZON, action_dim=9, image_resolution=(14, 14))
    settings: dict = {"batch_size": 5, "num_workers": 0, "seed": 3} | options
    return TrainConfig(name="test", model=model, data=data, assets_base_dir=str(tmp_path), **settings)


@dataclasses.dataclass(frozen=True)
class LiberoWithoutTokens(LeRobotLiberoDataConfig):
    def create(self, assets_dirs, model_config):
        finish = (keep_model_keys, transforms.ResizeImages(14, 14), transforms.PadStatesAndActions(9))
        stats = {
            "state": NormStats(np.ones(8), np.full(8, 2.0)),
            "actions": NormStats(np.zeros(7), np.full(7, 10.0)),
        }
        return dataclasses.replace(
            super().create(assets_dirs, model_config),
            norm_stats=stats,
            model_transforms=transforms.Group(inputs=finish),
        )


def test_batches_hold_normalised_padded_model_inputs(tmp_path):
    loader = data_loader.create_batch_loader(recipe(tmp_path), shuffle=False, keep_padding_flags=True)
    first, second = take(loader, 2)
    assert first["image"].keys() == {"base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"}
    assert first["image"]["base_0_rgb"].shape == (5, 14, 14, 3)
    assert first["image"]["base_0_rgb"].dtype == np.uint8
    np.testing.assert_array_equal(first["image_mask"]["right_wrist_0_rgb"], [False] * 5)
    assert first["state"].shape == (5, 9)
    np.testing.assert_allclose(first["state"][:, :8], -0.5, atol=1e-6)
    assert first["actions"].shape == (5, HORIZON, 9)
    np.testing.assert_allclose(first["actions"][2, :, 0], [1.4, 2.1, 2.8, 3.5], rtol=1e-6)
    # Frame 8 is the last of its episode: its action is repeated, and says so.
    np.testing.assert_allclose(second["actions"][3, :, 0], [5.6] * HORIZON, rtol=1e-6)
    np.testing.assert_array_equal(second["actions_is_pad"][3], [False, True, True, True])


def test_padding_flags_are_not_there_unless_asked_for(tmp_path):
    batch = next(iter(data_loader.create_batch_loader(recipe(tmp_path))))
    assert batch.keys() == {"image", "image_mask", "state", "actions"}


def test_processes_and_threads_give_bitwise_equal_batches_across_a_resume(tmp_path):
    config = recipe(tmp_path)
    threads = data_loader.create_batch_loader(config, num_workers=0)
    processes = data_loader.create_batch_loader(config, num_workers=2)
    expected = take(threads, 6)
    batches = iter(processes)
    found = [next(batches) for _ in range(3)]
    state = processes.state()
    processes.close()
    resumed = data_loader.create_batch_loader(config, num_workers=0)
    resumed.restore(state)
    found += take(resumed, 3)
    for mine, theirs in zip(found, expected, strict=True):
        assert_batches_equal(mine, theirs)


def assert_batches_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, dict):
            assert_batches_equal(value, second[key])
        else:
            np.testing.assert_array_equal(value, second[key])
            assert value.dtype == second[key].dtype


def test_held_out_episodes_are_only_in_the_validation_split(tmp_path):
    config = recipe(tmp_path, holdout_episodes=1)
    seen = {}
    for split in ("train", "val", "all"):
        loader = data_loader.create_batch_loader(config, split=split, skip_norm_stats=True)
        batches = take(loader, loader.batches_per_epoch + 2)
        seen[split] = set(np.concatenate([batch["state"][:, 0] for batch in batches]).tolist())
    assert len(seen["val"]) == 1
    assert not seen["train"] & seen["val"]
    assert seen["all"] == {0, 1, 2, 3}


@given(total=st.integers(1, 200), holdout=st.floats(0, 1, exclude_max=True) | st.integers(0, 200), seed=st.integers(0))
def test_a_split_covers_all_episodes_without_overlap(total, holdout, seed):
    count = holdout if holdout >= 1 else int(np.ceil(holdout * total))
    if count >= total:
        with pytest.raises(ValueError, match="hold out fewer"):
            split_episodes(total, holdout, seed)
        return
    train, held = split_episodes(total, holdout, seed)
    assert sorted(train + held) == list(range(total))
    assert len(held) == count
    assert (train, held) == split_episodes(total, holdout, seed)
    if holdout >= 1:  # of a dataset that has grown, none is held out that was trained on
        assert not set(split_episodes(total + seed % 99, holdout, seed)[1]) & set(train)


def test_random_data_has_the_shapes_of_the_model_and_depends_on_the_index_only():
    model = Pi0Config(paligemma_variant="dummy", action_expert_variant="dummy", action_horizon=6, action_dim=5)
    dataset = recipe_data.FakeDataset(model, num_samples=10)
    sample = dataset[4]
    observation, actions = model.inputs_spec()
    for key, leaf in {"state": observation.state, "tokenized_prompt": observation.tokenized_prompt}.items():
        assert (sample[key].shape, sample[key].dtype) == (leaf.shape[1:], leaf.dtype)
    assert sample["actions"].shape == actions.shape[1:]
    assert -1 <= sample["state"].min() < sample["state"].max() < 1
    assert 0 <= sample["tokenized_prompt"].min() <= sample["tokenized_prompt"].max() < 2048
    assert all(sample["image_mask"].values()) and sample["tokenized_prompt_mask"].all()
    np.testing.assert_array_equal(dataset[4]["actions"], sample["actions"])
    assert not np.array_equal(dataset[5]["actions"], sample["actions"])
    assert len(list(iter_all(dataset))) == 10


def iter_all(dataset):
    return (dataset[i] for i in range(len(dataset)))


# --- errors -------------------------------------------------------------------------------------------------------


def test_missing_statistics_are_said_before_training(tmp_path):
    config = recipe(tmp_path)
    plain = LeRobotLiberoDataConfig(repo_id=config.data.repo_id, base_config=DataConfig(prompt_from_task=True))
    with pytest.raises(ValueError, match=r"no normalisation statistics for asset id .*openpi stats"):
        data_loader.create_batch_loader(dataclasses.replace(config, data=plain))


def test_a_feature_that_the_dataset_lacks_is_named(tmp_path):
    config = recipe(tmp_path)
    repack = transforms.Group(inputs=[transforms.RepackTransform({"image": "imag", "actions": "actions"})])
    data = SimpleDataConfig(repo_id=config.data.repo_id, base_config=DataConfig(repack_transforms=repack))
    with pytest.raises(KeyError, match=r"needs the key 'imag'.*Did you mean 'image'"):
        data_loader.create_batch_loader(dataclasses.replace(config, data=data), skip_norm_stats=True)


def test_a_prompt_that_the_repack_transform_would_drop_is_noticed(tmp_path):
    config = recipe(tmp_path)
    repack = transforms.Group(inputs=[transforms.RepackTransform({"state": "state", "actions": "actions"})])
    base = DataConfig(repack_transforms=repack, prompt_from_task=True)
    data = SimpleDataConfig(repo_id=config.data.repo_id, base_config=base)
    with pytest.raises(ValueError, match=r"prompt_from_task is set, but the repack transform drops the prompt"):
        data_loader.create_batch_loader(dataclasses.replace(config, data=data), skip_norm_stats=True)


def test_a_batch_larger_than_the_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size is 41, but the dataset has 40 samples"):
        data_loader.create_batch_loader(recipe(tmp_path, batch_size=41))


def test_recipes_without_a_recorded_dataset_say_so():
    with pytest.raises(ValueError, match="names no recorded dataset"):
        recipe_data.create_dataset(DataConfig(), Pi0Config())


def test_the_loader_brings_in_neither_jax_nor_torch():
    script = (
        "import sys, openpi.training.data_loader; print([m for m in ('jax', 'torch', 'grain') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
