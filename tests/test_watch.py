"""Does the robot see what training saw? Streams of observations, clean and spoilt; and what a server says of them."""

import dataclasses
import json

import numpy as np
import pytest

import tiny_arm
from arm_files import arm_stats, run, write_checkpoint
from openpi.policies.contract import Contract
from openpi.policies.policy_config import create_trained_policy
from openpi.policies.seen import Camera, Seen, view
from openpi.policies.watch import Watch
from openpi.serving.access import Limits
from openpi.training.data import seen as training_seen
from openpi.training.data.recipe_data import open_lerobot
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_live import server_thread

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
def seen() -> Seen:
    samples = []
    for number in range(30):
        episode = Arm(number).episode()
        samples += [(number, step == 0, episode[step]) for step in (0, 5, 11)]
    return Seen.of(samples, ["pick up the cube", "put it down"])


def codes(seen: Seen, stream: list[dict]) -> list[str]:
    watch = Watch(seen)
    return sorted({warning[1:].partition("]")[0] for observation in stream for warning in watch.look(observation)})


def test_a_clean_robot_is_not_bothered(seen):
    assert [codes(seen, Arm(100 + i).episode()) for i in range(10)] == [[]] * 10


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("swapped", lambda o, _: {"camera/top": o["camera/side"], "camera/side": o["camera/top"]}),
        ("frozen", lambda o, first: {"camera/top": first["camera/top"]}),
        ("blank", lambda o, _: {"camera/side": np.zeros_like(o["camera/side"])}),
        ("blank", lambda o, _: {"camera/side": np.full_like(o["camera/side"], 255)}),
        ("turned", lambda o, _: {"camera/top": o["camera/top"][::-1, ::-1]}),
        ("turned", lambda o, _: {"camera/top": o["camera/top"][:, ::-1]}),
        ("turned", lambda o, _: {"camera/side": np.moveaxis(o["camera/side"][::-1], -1, 0)}),
        ("view", lambda o, _: {"camera/top": o["camera/top"][:30, :40].repeat(2, 0).repeat(2, 1)}),
        ("units", lambda o, _: {"state": np.r_[np.rad2deg(o["state"][:3]), o["state"][3:]]}),
        ("order", lambda o, _: {"state": np.roll(o["state"], 1)}),
        ("polarity", lambda o, _: {"state": np.r_[o["state"][:3], 1 - o["state"][3:]]}),
        ("prompt", lambda o, _: {"prompt": "open the drawer"}),
    ],
)
def test_each_mistake_is_told_by_its_code_within_an_episode_and_nothing_else(seen, code, change):
    stream = Arm(200).episode()
    assert codes(seen, [{**observation, **change(observation, stream[0])} for observation in stream]) == [code]


def test_a_robot_that_strays_a_little_has_no_other_units(seen):
    stream = [{**o, "state": np.float32([o["state"][0], 2.2, o["state"][2], 1.8])} for o in Arm(40).episode()]
    assert "units" not in codes(seen, stream)


def test_a_robot_that_stands_still_has_no_frozen_camera(seen):
    observation = Arm(3).episode()[0]
    assert codes(seen, [observation] * 10) == []


def test_a_prompt_may_be_written_a_little_otherwise(seen):
    stream = [{**observation, "prompt": np.array("Pick up the  CUBE.")} for observation in Arm(4).episode()]
    assert codes(seen, stream) == []
    (told,) = Watch(seen).look({**stream[0], "prompt": b"pick up the ball"})
    assert "the nearest is 'pick up the cube'" in told


def test_the_nearest_prompt_is_found_by_its_words_however_long_what_was_sent_is():
    seen = Seen({}, {}, tuple(f"put block {i} on the plate {i}" for i in range(500)))
    (told,) = Watch(seen).look({"prompt": "put block 77 on the plate 77, please " * 100_000})
    assert "the nearest is 'put block 77 on the plate 77'" in told


def test_a_view_does_not_depend_on_the_layout_and_takes_any_size():
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    np.testing.assert_array_equal(view(image), view(np.moveaxis(image, -1, 0)))
    for shape in ((4, 5, 3), (28, 28, 3), (720, 1280, 3)):
        assert view(np.full(shape, 77, np.uint8)).tolist() == [[77.0] * 8] * 8


@pytest.fixture(scope="module")
def contract() -> Contract:
    config = tiny_arm.recipe
    data_config = dataclasses.replace(config.data.create(config.assets_dirs, config.model), norm_stats=arm_stats())
    dataset = open_lerobot(data_config, config.model)
    found = training_seen.look(config, data_config, dataset, training_seen.trained_on(config, data_config, dataset))
    return dataclasses.replace(Contract.build(data_config, config.model), seen=found)


def test_what_training_saw_travels_with_the_contract_and_damage_is_refused(contract, tmp_path):
    contract.save(tmp_path)
    assert Contract.load(tmp_path) == contract
    assert contract.seen is not None and set(contract.seen.cameras) == {"observation/image", "observation/wrist_image"}
    assert contract.seen.prompts and len(contract.seen.state["observation/state"].low) == 8
    document = json.loads((tmp_path / "contract.json").read_text())
    for views in ("AAAA", "%%", ""):
        document["seen"]["cameras"]["observation/image"]["views"] = views
        (tmp_path / "contract.json").write_text(json.dumps(document))
        with pytest.raises(ValueError, match=r"contract\.json is damaged"):
            Contract.load(tmp_path)


def test_a_server_tells_the_robot_or_refuses(contract, tmp_path, caplog):
    checkpoint = write_checkpoint(tmp_path / "1")
    contract.save(checkpoint)
    policy = create_trained_policy(tiny_arm.recipe, checkpoint, sample_kwargs={"num_steps": 1})
    assert policy.contract is not None and policy.contract.seen is not None
    observation = _observation()
    spoilt = {**observation, "prompt": "fold the towel"}
    with server_thread(lambda: policy) as (_, port):
        client = WebsocketClientPolicy("127.0.0.1", port)
        assert not [w for w in client.infer(observation).get("warnings", ()) if w.startswith("[prompt]")]
        for _ in range(2):
            assert any(w.startswith("[prompt] prompt: 'fold the towel'") for w in client.infer(spoilt)["warnings"])
        client.close()
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
    np.savez(tmp_path / "seen.npz", **observation)
    assert run("explain", checkpoint, "--observation", tmp_path / "seen.npz", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    told = {(f["key"], f["message"][:20]) for stage in document["stages"] for f in stage["findings"]}
    assert ("observation/image", "the picture is black") in told
    assert any(key == "prompt" and message.startswith("'fold the towel'") for key, message in told)


def _observation() -> dict:
    from openpi.training.data.moments import Moments

    config = tiny_arm.recipe
    data_config = dataclasses.replace(config.data.create(config.assets_dirs, config.model), norm_stats=arm_stats())
    return dict(Moments(config, data_config, [0]).at(0, 0).observation)


def test_views_of_one_episode_only_are_compared_with_each_other():
    views = np.stack([view(Arm(1).episode()[step]["camera/top"]) for step in (0, 5, 11)])
    assert 0 < Camera.of(views, np.zeros(3, int)).usual < 1
