"""Does the robot see what training saw? Streams of observations, clean and spoilt; and what a server says of them."""

import dataclasses
import json

import numpy as np
import pytest

import tiny_arm
from arm_files import arm_stats, run, write_checkpoint
from openpi.policies import images
from openpi.policies.contract import Contract
from openpi.policies.guards import ObservationError
from openpi.policies.pace import Pace
from openpi.policies.policy_config import create_trained_policy
from openpi.policies.robot_spec import VectorSpec
from openpi.policies.seen import Camera, Column, Seen, view
from openpi.policies.watch import Watch, once
from openpi.serving import conversation
from openpi.serving.access import Limits
from openpi.serving.client_log import ClientLog
from openpi.serving.watching import Watching
from openpi.training.data import holdout
from openpi.training.data import seen as training_seen
from openpi.training.data.recipe_data import open_lerobot
from openpi_client import image_tools
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_live import TestPolicy, get, server_thread

LOW, HIGH = np.array([-1.5, -1.0, 0.2, 0.0]), np.array([-0.5, 1.0, 1.0, 1.0])


class Arm:
    """A room that two cameras see, and an arm that goes through it; the hand is open (1) at first."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        room = np.random.default_rng(7)
        self.scenes = {f"camera/{name}": _smooth(room.uniform(0, 255, (6, 6, 3))) for name in ("top", "side")}

    def episode(self, steps: int = 12) -> list[dict]:
        lamp, start = self.rng.uniform(0.7, 1.0), self.rng.uniform(0, 0.2, 3)
        path = np.linspace(start, self.rng.uniform(0.6, 1.0, 3), steps)
        gripper = np.where(np.arange(steps) < steps // 2, 1.0, 0.05)
        return [self._observation(place, grip, lamp) for place, grip in zip(path, gripper, strict=True)]

    def _observation(self, place, grip, lamp) -> dict:
        images = {}
        for key, scene in self.scenes.items():
            image = (scene * lamp + self.rng.normal(0, 2, scene.shape)).clip(0, 255).astype(np.uint8)
            row, column = (place[:2] * 40).astype(int)
            image[row : row + 12, column : column + 12] = (200, 30, 30)
            images[key] = image
        state = LOW + np.array([*place, grip]) * (HIGH - LOW)
        return {**images, "state": state.astype(np.float32), "prompt": "pick up the cube"}


def _smooth(small: np.ndarray) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(small.astype(np.uint8)).resize((80, 60), Image.Resampling.BICUBIC), np.float64)


@pytest.fixture(scope="module")
def episodes() -> list[list[dict]]:
    return [Arm(number).episode() for number in range(30)]


@pytest.fixture(scope="module")
def samples(episodes) -> list[tuple[int, bool, dict]]:
    return [(number, step == 0, episode[step]) for number, episode in enumerate(episodes) for step in (0, 5, 11)]


@pytest.fixture(scope="module")
def seen(samples) -> Seen:
    return Seen.of(samples, ["pick up the cube", "put it down"])


def codes(seen: Seen, stream: list[dict]) -> list[str]:
    watch = Watch(seen)
    return sorted({warning[1:].partition("]")[0] for observation in stream for warning in watch.look(observation)})


def test_a_clean_robot_is_not_bothered(seen):
    assert [codes(seen, Arm(100 + i).episode()) for i in range(10)] == [[]] * 10


def test_a_robot_that_sends_floats_in_0_to_1_and_its_prompt_in_a_list_is_not_bothered(seen):
    def other(observation):
        images = {key: observation[key] / np.float32(255) for key in ("camera/top", "camera/side")}
        return {**observation, **images, "prompt": [observation["prompt"]]}

    assert codes(seen, [other(observation) for observation in Arm(100).episode()]) == []


MISTAKES = [
    ("swapped", lambda o, _: {"camera/top": o["camera/side"], "camera/side": o["camera/top"]}),
    ("frozen", lambda o, first: {"camera/top": first["camera/top"]}),
    ("blank", lambda o, _: {"camera/side": np.zeros_like(o["camera/side"])}),
    ("blank", lambda o, _: {"camera/side": np.full_like(o["camera/side"], 255)}),
    ("swapped", lambda o, _: {"camera/side": o["camera/top"]}),
    ("swapped", lambda o, _: {"camera/side": o["camera/top"] + (o["camera/top"] < 128)}),
    ("turned", lambda o, _: {"camera/top": o["camera/top"][::-1, ::-1]}),
    ("turned", lambda o, _: {"camera/top": o["camera/top"][:, ::-1]}),
    ("turned", lambda o, _: {"camera/side": np.moveaxis(o["camera/side"][::-1], -1, 0)}),
    ("view", lambda o, _: {"camera/top": o["camera/top"][:30, :40].repeat(2, 0).repeat(2, 1)}),
    ("colors", lambda o, _: {key: o[key][..., ::-1] for key in ("camera/top", "camera/side")}),
    ("units", lambda o, _: {"state": np.r_[np.rad2deg(o["state"][:3]), o["state"][3:]]}),
    ("order", lambda o, _: {"state": np.roll(o["state"], 1)}),
    ("polarity", lambda o, _: {"state": np.r_[o["state"][:3], 1 - o["state"][3:]]}),
    ("prompt", lambda o, _: {"prompt": "open the drawer"}),
]


@pytest.mark.parametrize(("code", "change"), MISTAKES)
def test_each_mistake_is_told_by_its_code_within_an_episode_and_nothing_else(seen, code, change):
    stream = Arm(200).episode()
    assert codes(seen, [{**observation, **change(observation, stream[0])} for observation in stream]) == [code]


@pytest.mark.parametrize(("code", "change"), [mistake for mistake in MISTAKES if mistake[0] != "frozen"])
def test_one_observation_is_enough_for_whoever_has_no_more(seen, code, change):
    first = Arm(200).episode()[0]
    assert {warning[1:].partition("]")[0] for warning in once(seen, {**first, **change(first, first)})} == {code}
    assert once(seen, first) == []


def _lit(image: np.ndarray, *gains: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 2, image.shape)
    return (image * np.array(gains) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: np.repeat(image.mean(-1, keepdims=True), 3, -1).astype(np.uint8),
        lambda image: _lit(np.repeat(image.mean(-1, keepdims=True), 3, -1), 1, 1, 1),
        lambda image: _lit(image, 0.08, 0.08, 0.08),
        lambda image: _lit(image, 1.25, 1.0, 0.75),
        lambda image: _lit(image, 0.75, 1.0, 1.25),
        lambda image: np.where((image == (200, 30, 30)).all(-1, keepdims=True), (30, 30, 200), image).astype(np.uint8),
    ],
    ids=["grey", "grey with noise", "night", "warm lamp", "cold lamp", "the cube is blue"],
)
def test_colors_that_are_none_or_others_are_not_taken_for_exchanged_ones(seen, change):
    for stream in (Arm(200).episode(), Arm(201).episode()):
        changed = [{**each, **{key: change(each[key]) for key in ("camera/top", "camera/side")}} for each in stream]
        assert "colors" not in codes(seen, changed)


def test_a_camera_whose_only_color_is_that_of_a_thing_tells_nothing_of_the_order_of_colors():
    rng = np.random.default_rng(0)
    pictures = [(rng.normal(128, 2, (60, 80, 3))).clip(0, 255).astype(np.uint8) for _ in range(20)]
    for picture in pictures:
        picture[20:40, 30:50] = (200, 30, 30)  # a red cube, always there; a blue one is no exchange
    assert Camera.of(np.stack([images.cells(each) for each in pictures]), np.arange(20)).hue == ()


def test_one_picture_under_two_names_is_told_however_alike_the_cameras_are_unless_training_had_it(samples):
    def alike(observation, noise):
        return {**observation, "camera/side": observation["camera/top"] ^ np.uint8(noise)}

    stream = Arm(200).episode()
    near, one = (Seen.of([(e, first, alike(o, noise)) for e, first, o in samples], []) for noise in (1, 0))
    [warning] = Watch(near).look(alike(stream[0], 0))
    assert warning.startswith("[swapped] camera/side: is the very picture of 'camera/top'")
    assert codes(near, [alike(o, 1) for o in stream]) == codes(one, [alike(o, 0) for o in stream]) == []


def test_a_robot_that_strays_a_little_has_no_other_units(seen):
    stream = [{**o, "state": np.float32([o["state"][0], 2.2, o["state"][2], 1.8])} for o in Arm(40).episode()]
    assert "units" not in codes(seen, stream)


def test_a_robot_that_stands_still_has_no_frozen_camera(seen):
    observation = Arm(3).episode()[0]
    assert codes(seen, [observation] * 10) == []


def test_a_prompt_may_be_written_a_little_otherwise(seen):
    stream = [{**observation, "prompt": np.array("Pick up the  CUBE.")} for observation in Arm(4).episode()]
    assert codes(seen, stream) == []
    watch = Watch(seen)
    for _ in range(2):
        (told,) = watch.look({**stream[0], "prompt": b"pick up the ball"})
        assert "the nearest is 'pick up the cube'" in told
    assert watch.look(stream[0]) == []
    assert codes(seen, [{**stream[0], "prompt": ""}]) == ["prompt"]
    assert codes(seen, [{**stream[0], "prompt": None}]) == []  # the default one is used


def test_the_nearest_prompt_is_found_by_its_words_however_long_what_was_sent_is():
    seen = Seen({}, {}, tuple(f"put block {i} on the plate {i}" for i in range(500)))
    (told,) = Watch(seen).look({"prompt": "put block 77 on the plate 77, please " * 100_000})
    assert "the nearest is 'put block 77 on the plate 77'" in told


@pytest.fixture(scope="module")
def seen_whole(seen, samples, episodes) -> Seen:
    """With the averages of whole episodes, as a dataset has them."""
    states = np.array([[observation["state"] for observation in episode] for episode in episodes], np.float64)
    column = Column(states.min((0, 1)), states.max((0, 1)), states.mean(axis=1))
    return Seen.of(samples, seen.prompts, {"state": column}, episode_length=12)


@pytest.fixture(scope="module")
def session() -> list[dict]:
    return [observation for number in range(200, 220) for observation in Arm(number).episode()]


def shifted(observation: dict, part: float) -> dict:
    return {"state": observation["state"] + np.float32([0, 0.9 * part, 0, 0])}


def tinted(observation: dict, part: float, *factors: float) -> dict:
    return {"camera/top": (observation["camera/top"] * (1 + (np.array(factors) - 1) * part)).astype(np.uint8)}


@pytest.mark.parametrize(
    ("subject", "change"),
    [
        (None, lambda o, part: {}),
        ("state[1]", shifted),
        ("camera/top", lambda o, part: tinted(o, part, 0.4, 0.4, 0.4)),
        ("camera/top", lambda o, part: tinted(o, part, 1, 1, 0.4)),
    ],
)
def test_what_changes_little_by_little_is_told_of_and_a_long_clean_session_is_not(seen_whole, session, subject, change):
    watch = Watch(seen_whole)
    found = {w.partition(":")[0] for i, o in enumerate(session) for w in watch.look(o | change(o, i / len(session)))}
    assert {w for w in found if w.startswith("[drift]")} == ({f"[drift] {subject}"} if subject else set())
    outside = {(each.key, each.part) for each in watch.drift.averages() if each.is_outside}
    assert bool(outside) == bool(subject) and len(list(watch.drift.averages())) == 4 + 2 * 3


def test_a_robot_that_waits_where_episodes_begin_has_not_drifted(seen_whole):
    watch, first = Watch(seen_whole), Arm(3).episode()[0]
    assert not [w for _ in range(300) for w in watch.look(first) if w.startswith("[drift]")]


def robot(rate_hz: float, horizon: int, *, follows: bool = True) -> Contract:
    joints, hold = tuple(f"joint_{i}" for i in range(7)), "stay" if follows else "zero"
    return Contract(
        robot="arm",
        model_type="pi05",
        cameras=(),
        state=(VectorSpec.uniform("state", joints, "rad"),),
        actions=VectorSpec.uniform("actions", joints, "rad"),
        action_kind="",
        trained_relative=(False,) * 7,
        action_horizon=horizon,
        control_hz=rate_hz,
        hold=(hold,) * 7,
    )


def rate_warnings(
    contract: Contract, loop_hz: float, rows: int, *, delay_s=0.02, lag=3, waits=True, jitter_s=0.001
) -> list[str]:
    """Of a robot whose arm follows what it plays, so many ticks behind, and asks 20 times."""
    pace, rng, now_s, played = Pace(contract), np.random.default_rng(0), 0.0, 10
    assert contract.control_hz is not None

    def path(row):
        return np.sin(0.5 * row / contract.control_hz + np.arange(7))

    found = []
    for _ in range(20):
        found += pace.asked({"state": path(played - lag)}, now_s)
        pace.answered(np.stack([path(played + row) for row in range(contract.action_horizon)]), now_s + delay_s)
        played += rows
        now_s += max(rows / loop_hz, delay_s + (rows - 1) / loop_hz) if waits else delay_s
        now_s += abs(rng.normal(0, jitter_s))
    return found


@pytest.mark.parametrize(("rate_hz", "horizon"), [(50, 50), (10, 10), (15, 15)])
@pytest.mark.parametrize("rows", [3, 5, 10])
def test_a_loop_at_another_rate_is_told_of_within_20_requests_and_one_at_about_the_right_one_is_not(
    rate_hz, horizon, rows
):
    contract = robot(rate_hz, horizon)
    for loop_hz in (0.8 * rate_hz, rate_hz, 1.2 * rate_hz):
        for delay_s in (0.01, 0.08):
            assert rate_warnings(contract, loop_hz, rows, delay_s=delay_s) == []
    for loop_hz in (rate_hz / 5, 4 * rate_hz):
        told = rate_warnings(contract, loop_hz, rows, delay_s=0.005)
        assert told and all(f"training had {rate_hz}; run its loop at {rate_hz} Hz" in each for each in told)


def test_a_robot_that_asks_for_less_than_its_chunks_last_plays_them_slowly_whatever_its_actions_are():
    contract = robot(50, 50, follows=False)
    (told, *_) = rate_warnings(contract, 10, 50)
    assert told.startswith("[rate] requests: the robot asks every 5 s, for chunks of 50 rows: it plays at most 10 rows")
    assert rate_warnings(contract, 50, 50) == []
    (told, *_) = rate_warnings(robot(10, 10, follows=False), 50, 1, delay_s=0.005)
    assert "plays at least" in told


def test_programs_that_keep_no_time_have_no_rate():
    assert rate_warnings(robot(10, 10), 10, 1, waits=False, jitter_s=0) == []  # frames of a recording, one by one
    assert rate_warnings(robot(50, 50), 10, 50, jitter_s=3.0) == []  # somebody arranges the scene in between
    pace = Pace(robot(50, 50))
    assert not [w for i in range(30) for w in pace.asked({"state": np.zeros(7)}, 5.0 * i)]  # nothing moves


def test_a_strict_server_refuses_a_wrong_rate_and_a_simulator_is_not_asked_for_one(monkeypatch):
    class Served:
        contract = robot(50, 50)

    def ask(**flags) -> list[str]:
        watching, found = Watching(Served(), ClientLog(), "robot:1", **flags), []
        for i in range(20):
            found += watching.look([{"state": np.full(7, 0.1 * i)}], 5.0 * i)
            watching.answered({}, 5.0 * i + 0.1)
        return found

    assert ask(is_strict=False)[0].startswith("[rate]")
    with pytest.raises(ObservationError, match=r"strict: \[rate\]"):
        ask(is_strict=True)
    assert ask(is_strict=True, keeps_time=False) == []
    kept = []

    class Noted(Watching):
        def __init__(self, *args, keeps_time: bool, **flags):
            kept.append(keeps_time)
            super().__init__(*args, keeps_time=keeps_time, **flags)

    monkeypatch.setattr(conversation, "Watching", Noted)
    with server_thread(TestPolicy) as (_, port):
        for max_age_s in ("chunk", None):
            with WebsocketClientPolicy("127.0.0.1", port, max_age_s=max_age_s) as client:
                client.infer({"x": np.zeros(1)})
    assert kept == [True, False]


def test_a_dead_camera_is_told_without_anything_known_of_training():
    class Served:
        contract = None

    def told(picture, *, step: float = 0.1, **flags) -> list[str]:
        watching = Watching(Served(), ClientLog(), "robot:1", is_strict=False, **flags)
        found = [watching.look([{"state": np.full(7, step * i), "image": picture(i)}], 0.5 * i) for i in range(10)]
        return [warning.partition(":")[0] for warnings in found for warning in warnings]

    still = np.zeros((60, 80, 3), np.uint8)
    assert told(lambda i: still) == ["[frozen] image"] * 4
    assert told(lambda i: still, step=0.0) == told(lambda i: still, keeps_time=False) == []
    assert told(lambda i: still + np.uint8(i)) == []


def test_a_view_does_not_depend_on_the_layout_and_takes_any_size():
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    np.testing.assert_array_equal(view(image), view(np.moveaxis(image, -1, 0)))
    np.testing.assert_array_equal(view(image[::-1, ::-1]), view(image[::-1, ::-1].copy()))
    for shape in ((4, 5, 3), (28, 28, 3), (720, 1280, 3)):
        assert view(np.full(shape, 77, np.uint8)).tolist() == [[77.0] * 8] * 8


def test_an_image_is_looked_at_once_within_a_request_and_anew_in_the_next():
    image = np.full((60, 80, 3), 77, np.uint8)
    with images.looked_at_once():
        assert images.cells(image) is images.cells(image)
        assert images.cells(image.copy()) is not images.cells(image)
    image[:] = 5  # a program may use one array for all of its pictures
    assert images.channel_mean(image) == (5, 5, 5)


@pytest.fixture(scope="module")
def contract() -> Contract:
    config = tiny_arm.recipe
    data_config = dataclasses.replace(config.data.create(config.assets_dirs, config.model), norm_stats=arm_stats())
    dataset = open_lerobot(data_config, config.model)
    numbers, _ = holdout.split_dataset(config, data_config, dataset)
    found = training_seen.look(config, data_config, dataset, numbers)
    return dataclasses.replace(Contract.build(data_config, config.model), seen=found)


def test_what_training_saw_travels_with_the_contract_and_damage_is_refused(contract, tmp_path):
    contract.save(tmp_path)
    assert Contract.load(tmp_path) == contract
    assert contract.seen is not None and set(contract.seen.cameras) == {"observation/image", "observation/wrist_image"}
    assert contract.seen.prompts and len(contract.seen.state["observation/state"].low) == 8
    document = json.loads((tmp_path / "contract.json").read_text())
    assert contract.seen.episode_length > 20
    image, state = document["seen"]["cameras"]["observation/image"], document["seen"]["state"]["observation/state"]
    for part, name, value in (
        *((image, "views", views) for views in ("AAAA", "%%", "")),
        (image, "color_low", [1.0]),
        (state, "mean_low", [1.0]),
        (state, "low", []),
        (document["seen"], "episode_length", -1),
    ):
        right, part[name] = part[name], value
        (tmp_path / "contract.json").write_text(json.dumps(document))
        with pytest.raises(ValueError, match=r"contract\.json is damaged"):
            Contract.load(tmp_path)
        part[name] = right
    for part, names in ((image, ("color_low", "color_high")), (state, ("mean_low", "mean_high"))):
        for name in names:  # as before there were averages
            del part[name]
    (tmp_path / "contract.json").write_text(json.dumps(document))
    before = Contract.load(tmp_path).seen
    assert before is not None and not before.state["observation/state"].mean_low
    assert not [each for each in Watch(before).drift.averages() if each.key == "observation/image"]


def test_a_server_tells_the_robot_or_refuses(contract, tmp_path, caplog, monkeypatch):
    checkpoint, looked_at, look_at = write_checkpoint(tmp_path / "1"), [], images._cells
    monkeypatch.setattr(images, "_cells", lambda image: (looked_at.append(image.shape), look_at(image))[1])
    means = dict.fromkeys(contract.seen.cameras, (120.0, 100.0, 80.0))
    dataclasses.replace(contract, camera_means=means).save(checkpoint)
    policy = create_trained_policy(tiny_arm.recipe, checkpoint, sample_kwargs={"num_steps": 1})
    assert policy.contract is not None and policy.contract.seen is not None
    observation = _observation()
    spoilt = {**observation, "prompt": "fold the towel"}
    with server_thread(lambda: policy) as (_, port):
        client = WebsocketClientPolicy("127.0.0.1", port)
        assert not [w for w in client.infer(observation).get("warnings", ()) if w.startswith("[prompt]")]
        assert len(looked_at) == len(means)  # by several guards
        for _ in range(2):
            assert any(w.startswith("[prompt] prompt: 'fold the towel'") for w in client.infer(spoilt)["warnings"])
        client.close()
        assert 'openpi_warnings_total{code="prompt",model="default"} 2.0' in get(port, "/metrics")[2]
    assert sum("[prompt]" in record.message for record in caplog.records) == 1
    with server_thread(lambda: policy, limits=Limits(refuses_suspicious=True)) as (_, port):
        client = WebsocketClientPolicy("127.0.0.1", port)
        with pytest.raises(RuntimeError, match=r"this server is strict: \[prompt\]"):
            client.infer(spoilt)
        assert client.infer(observation)["actions"].shape == (5, 7)
        client.close()


def test_explain_says_the_same_of_one_observation(contract, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "1")
    contract.save(checkpoint)
    observation = _observation() | {"prompt": "fold the towel"}
    observation["observation/image"] = np.zeros_like(observation["observation/image"])
    observation["observation/state"] = np.r_[99.0, observation["observation/state"][1:]]
    np.savez(tmp_path / "seen.npz", **observation)
    assert run("explain", checkpoint, "--observation", tmp_path / "seen.npz", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    told = {(f["code"], f["key"], f["message"][:20]) for stage in document["stages"] for f in stage["findings"]}
    assert ("blank", "observation/image", "the picture is black") in told
    assert any(each[:2] == ("prompt", "prompt") and each[2].startswith("'fold the towel'") for each in told)
    assert any(each[:2] == ("range", "state 'x'") for each in told), told


def _observation() -> dict:
    from openpi.training.data.moments import Moments

    config = tiny_arm.recipe
    data_config = dataclasses.replace(config.data.create(config.assets_dirs, config.model), norm_stats=arm_stats())
    return dict(Moments(config, data_config, [0]).at(0, 0).observation)


def test_views_of_one_episode_only_are_compared_with_each_other():
    colored = np.stack([images.cells(Arm(1).episode()[step]["camera/top"]) for step in (0, 5, 11)])
    camera = Camera.of(colored, np.zeros(3, int))
    assert 0 < camera.usual < 1 and not camera.hue  # of one arrangement of things nobody knows what else there is


def _sent(observation: dict, size: int) -> dict:
    """As our clients send pictures: letterboxed."""
    return {
        key: image_tools.resize_with_pad(value, size, size) if np.ndim(value) == 3 else value
        for key, value in observation.items()
    }


def test_letterboxed_pictures_are_those_of_training(seen, samples, episodes):
    """Frames of training came back from the documented client, and the server refused them as another camera's."""
    assert {camera.aspect for camera in seen.cameras.values()} == {80 / 60}
    assert _warnings(seen, [_sent(step, 224) for step in Arm(99).episode()]) == []
    shrunk = Seen.of([(number, first, _sent(step, 64)) for number, first, step in samples], ["pick up the cube"])
    assert {camera.aspect for camera in shrunk.cameras.values()} == {1.0}
    assert _warnings(shrunk, Arm(99).episode()) == []


def test_a_picture_that_was_cut_to_a_square_is_another_one(seen):
    cut = [
        {key: value[:, 10:70] if np.ndim(value) == 3 else value for key, value in step.items()}
        for step in Arm(99).episode()
    ]
    assert any("[view]" in text for text in _warnings(seen, cut))


def test_what_moves_between_the_pixels_of_a_view_is_no_frozen_camera(seen):
    still = Arm(99).episode()[0]
    large = {key: np.repeat(np.repeat(v, 8, 0), 8, 1) if np.ndim(v) == 3 else v for key, v in still.items()}
    for moves in (True, False):
        steps = []
        for i in range(12):
            step = {**large, "state": large["state"] + np.float32(0.05 * i)}
            if moves:
                for key in ("camera/top", "camera/side"):
                    step[key] = step[key].copy()
                    step[key][101, 101 + i] ^= 255  # no pixel that is looked at
            steps.append(step)
        assert any("[frozen]" in text for text in _warnings(seen, steps)) is not moves


def _warnings(seen: Seen, observations: list[dict]) -> list[str]:
    watch = Watch(seen)
    return [text for observation in observations for text in watch.look(observation)]
