"""ALOHA's simulator: the recipe's keys and picture, the gripper's sign, success, seeds, an expert that hands over."""

import numpy as np
import pytest

pytest.importorskip("gym_aloha")

from openpi.cli.serving.serve_dummy import of_recipe
from openpi.envs.world import PRIVILEGED
from openpi_sim import extra, opengl
from openpi_sim.aloha import planning, ways
from openpi_sim.aloha.config import AlohaConfig

START = np.array([0, -0.96, 1.16, 0, -0.3, 0] * 2).reshape(2, 6)
SHUT, WIDE = 0.065, 0.975  # what grippers reach that are told 0 and 1: the fingers' joints end there


@pytest.fixture(scope="module")
def config():
    return AlohaConfig(image_size=64)


@pytest.fixture(scope="module")
def world(config):
    world = config.open(privileged=True)
    yield world
    world.close()


@pytest.fixture(scope="module")
def expert(config):
    return config.expert()


@pytest.fixture(scope="module")
def task(config):
    return config.tasks()[0]


def test_it_sends_what_the_recipe_s_contract_takes(world, config, task):
    world.reset(task, 0)
    sent = world.observe()
    assert sent.pop(PRIVILEGED)["task"] == task.name
    of_recipe(config.recipe, config.control_hz).check(sent)
    assert sent["state"].dtype == np.float64 and sent["images"]["cam_high"].dtype == np.uint8
    assert sent["images"]["cam_high"].shape == (3, 64, 64)
    assert not sent["images"]["cam_high"][:, :8].any() and not sent["images"]["cam_high"][:, -8:].any()  # 4:3
    np.testing.assert_allclose(sent["state"].reshape(2, 7)[:, :6], START, atol=0.01)
    assert task.max_steps == 300 and config.control_hz == 50 and task.prompt == "Transfer cube"


def test_seeds_repeat_and_differ(world, task):
    def start(seed):
        world.reset(task, seed)
        world.step(world.hold())
        seen = world.observe()
        return seen[PRIVILEGED]["qpos"], seen["images"]["cam_high"]

    first, other, again = start(3), start(4), start(3)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert np.abs(first[0][16:18] - other[0][16:18]).max() > 0.01


def test_one_opens_a_gripper_and_joints_are_absolute(world, task):
    world.reset(task, 0)
    action = world.hold()
    action[6], action[13], action[7] = 1.0, 0.0, 0.3
    for _ in range(60):
        world.step(action)
    state = world.observe()["state"]
    assert state[6] > 0.9 * WIDE and state[13] < SHUT + 0.05
    assert state[7] == pytest.approx(0.3, abs=0.02)
    assert not world.is_success


def test_insertion_has_a_world_and_no_expert(world):
    both = AlohaConfig(task="both")
    transfer, insertion = both.tasks()
    world.reset(insertion, 0)
    world.step(world.hold())
    seen = world.observe()
    assert seen["prompt"] == insertion.prompt != transfer.prompt
    assert len(seen[PRIVILEGED]["qpos"]) == 16 + 2 * 7
    assert both.expert() is None and AlohaConfig(task="insertion").expert() is None


@pytest.mark.parametrize("wrong", [np.zeros(13), np.full(14, np.nan)], ids=["width", "nan"])
def test_actions_that_are_none_are_refused(world, task, wrong):
    world.reset(task, 0)
    with pytest.raises(ValueError, match="the action"):
        world.step(wrong)


def test_the_expert_hands_the_cube_over(world, task, expert):
    world.reset(task, 7)
    rows, num_steps, lifted = [], 0, 0.0
    while num_steps < task.max_steps and not world.is_success:
        if not rows:
            seen = world.observe()
            lifted = max(lifted, seen[PRIVILEGED]["qpos"][18])
            rows = list(expert.infer(seen)["actions"][:25])
        world.step(rows.pop(0))
        num_steps += 1
    assert world.is_success and num_steps < 250
    assert lifted > 0.15  # success is a hand-over, not a touch on the table


def test_the_expert_notices_what_is_wrong_with_an_observation(world, task, expert):
    world.reset(task, 0)
    for _ in range(8):
        world.step(world.hold())
    seen = world.observe()
    image = seen["images"]["cam_high"]
    for wrong in (image[:, ::-1], image[:, :, ::-1], image[:, ::-1, ::-1]):
        with pytest.raises(ValueError, match="turned, mirrored"):
            expert.infer({**seen, "images": {"cam_high": wrong}})
    with pytest.raises(ValueError, match=r"expected uint8\[3, n, n\]"):
        expert.infer({**seen, "images": {"cam_high": image.transpose(1, 2, 0)}})
    with pytest.raises(ValueError, match="'state' is"):
        expert.infer({**seen, "state": -seen["state"]})
    with pytest.raises(KeyError, match="privileged"):
        expert.infer({key: value for key, value in seen.items() if key != PRIVILEGED})


def test_a_plan_is_judged_where_it_is_played():
    stage = planning.Stage()
    qpos = np.concatenate([[0, -0.96, 1.16, 0, -0.3, 0, 0.02239, -0.02239] * 2, [0.1, 0.5, 0.05, 1, 0, 0, 0]])
    (way, *_) = ways.TRANSFER
    assert planning.plan(stage, [way], qpos, np.zeros(22)).has_succeeded
    qpos[17] = 1.5  # out of reach
    assert not planning.plan(stage, [way], qpos, np.zeros(22)).has_succeeded


@pytest.mark.parametrize("cube_xy", [(0.05, 0.42), (0.15, 0.58)])
def test_an_arm_does_not_turn_its_wrist_half_round_on_the_way(cube_xy):
    stage = planning.Stage()
    qpos = np.concatenate([[0, -0.96, 1.16, 0, -0.3, 0, 0.02239, -0.02239] * 2, cube_xy, [0.02, 1, 0, 0, 0]])
    rows = planning.plan(stage, ways.TRANSFER[:1], qpos, np.zeros(22)).rows
    joints = np.delete(rows, [6, 13], axis=1)
    assert np.abs(np.diff(joints, axis=0)).max() < 0.1
    assert np.abs(joints[:, [9, 11]]).max() < np.pi / 2


def test_a_missing_simulator_or_opengl_says_what_to_install(monkeypatch):
    with pytest.raises(ImportError, match="uv sync --extra sim"):
        extra.check("no_such_simulator", "aloha")
    monkeypatch.delenv(opengl.VARIABLE, raising=False)
    monkeypatch.setattr(opengl, "_load", lambda *_: None)
    with pytest.raises(RuntimeError, match="apt-get install -y libegl1"):
        opengl.choose()
    monkeypatch.setenv(opengl.VARIABLE, "glfw")
    assert opengl.choose() == "glfw"
