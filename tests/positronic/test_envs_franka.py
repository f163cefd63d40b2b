"""The Franka world: the real arm's kinematics, reproducible scenes, an expert that stacks, scores that tell."""

import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from openpi_positronic.codecs.action import CartesianPose
from openpi_positronic.codecs.catalog import get_codec
from openpi_positronic.franka import FrankaStackEnv, expert, franka_observation, stacking
from openpi_positronic.franka.env import CONTROL_HZ
from openpi_positronic.franka.render import make_renderer
from openpi_positronic.franka.world import (
    ACTUATORS,
    EXTERIOR_CAMERA,
    GREEN,
    GRIPPER,
    JOINTS,
    MODEL_PATH,
    RED,
    SITE,
    START_JOINTS,
    WRIST_CAMERA,
    FrankaWorld,
    execute,
)
from openpi_sim import poses

# The manufacturer's Denavit-Hartenberg parameters after Craig: a (m), d (m), alpha (rad) per joint; limits in rad.
DH = [
    (0.0, 0.333, 0.0),
    (0.0, 0.0, -np.pi / 2),
    (0.0, 0.316, np.pi / 2),
    (0.0825, 0.0, np.pi / 2),
    (-0.0825, 0.384, -np.pi / 2),
    (0.0, 0.0, np.pi / 2),
    (0.088, 0.0, np.pi / 2),
]
FLANGE_M, HAND_TURN_RAD, SITE_M = 0.107, -np.pi / 4, 0.0584
LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])


def forward(joints):
    """Position and rotation matrix of the end effector, from the parameters alone."""
    turned = np.eye(4)
    for (a, d, alpha), angle in zip(DH, joints, strict=True):
        turned = turned @ about_x(alpha) @ shift(a, 0) @ about_z(angle) @ shift(0, d)
    turned = turned @ shift(0, FLANGE_M) @ about_z(HAND_TURN_RAD) @ shift(0, SITE_M)
    return turned[:3, 3], turned[:3, :3]


def about_x(angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1.0]])


def about_z(angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def shift(x, z):
    moved = np.eye(4)
    moved[[0, 2], 3] = x, z
    return moved


@pytest.fixture(scope="module")
def world() -> FrankaWorld:
    return FrankaWorld()


@pytest.fixture
def fresh(world) -> FrankaWorld:
    world.reset(np.random.default_rng(0))
    return world


def follow(world, poses_, grips):
    for pose, grip in zip(poses_, grips, strict=True):
        world.move_to_pose(pose)
        world.set_gripper(grip)
        world.step(33)


def test_the_arm_has_the_real_ones_geometry_and_limits(world):
    rng = np.random.default_rng(0)
    for joints in rng.uniform(LOW, HIGH, (50, 7)):
        position, rotation = forward(joints)
        pose = world._kinematics.pose(joints)
        np.testing.assert_allclose(pose[:3], position, atol=1e-6)
        np.testing.assert_allclose(poses.rotation_of(pose), rotation, atol=1e-6)
    np.testing.assert_array_equal([world.model.joint(name).range for name in JOINTS], np.stack([LOW, HIGH], axis=1))
    np.testing.assert_array_equal(
        [world.model.actuator(name).ctrlrange for name in (*ACTUATORS, GRIPPER)],
        [*np.stack([LOW, HIGH], axis=1), [0, 0.04]],
    )
    assert world.model.opt.timestep == 0.002


def test_joints_are_found_for_poses_that_the_arm_can_have(world):
    """From somewhere near, as between two commands."""
    rng = np.random.default_rng(1)
    for joints in rng.uniform(LOW * 0.8 + HIGH * 0.2, LOW * 0.2 + HIGH * 0.8, (40, 7)):
        target = world._kinematics.pose(joints)
        found = world._kinematics.joints(target, joints + rng.normal(0, 0.1, 7))
        assert found is not None
        assert ((found >= LOW) & (found <= HIGH)).all()
        error = poses.difference(target, world._kinematics.pose(found))
        assert np.linalg.norm(error[:3]) < 1e-3
        assert np.linalg.norm(error[3:]) < 1e-2


def test_a_pose_out_of_reach_is_a_failure_that_leaves_the_arm_alone(fresh):
    before = fresh.commanded_q
    fresh.move_to_pose(np.array([2.0, 0, 0.5, 0, 1, 0, 0]))
    assert fresh.has_failed
    np.testing.assert_array_equal(fresh.commanded_q, before)
    fresh.recover()
    assert not fresh.has_failed
    np.testing.assert_array_equal(fresh.commanded_q, fresh.q)


def test_a_seed_draws_one_scene_and_time_never_goes_back(world):
    world.reset(np.random.default_rng(7))
    first = world.data.qpos.copy()
    time_ns = world.time_ns
    world.step(10)
    world.reset(np.random.default_rng(7))
    np.testing.assert_array_equal(world.data.qpos, first)
    assert world.time_ns == time_ns + 10 * world.step_ns + 1000 * world.step_ns
    world.reset(np.random.default_rng(8))
    assert not np.array_equal(world.data.qpos, first)
    np.testing.assert_allclose(world.q, START_JOINTS, atol=0.02)
    assert world.grip < 0.05


def test_cubes_lie_on_the_table_with_room_between(world):
    for seed in range(5):
        world.reset(np.random.default_rng(seed))
        red, green = world.cube_position(RED), world.cube_position(GREEN)
        for x, y, z in (red, green):
            assert 0.31 <= x <= 0.69 and abs(y) <= 0.28 and abs(z - 0.31) < 1e-3
        assert np.linalg.norm(red - green) > 0.09
        assert stacking.scores(world)[stacking.SUCCESS] == 0


@pytest.mark.parametrize("seed", range(6))
def test_the_expert_stacks_and_then_has_nothing_to_do(world, seed):
    world.reset(np.random.default_rng(seed))
    follow(world, *expert.plan(world))
    scores = stacking.scores(world)
    assert scores[stacking.SUCCESS] > 0.9, scores
    assert len(expert.plan(world)[0]) == 0


def test_the_expert_fetches_a_cube_that_slipped(fresh):
    commanded, grips = expert.plan(fresh)
    follow(fresh, commanded[: len(commanded) // 2], grips[: len(commanded) // 2])
    fresh.set_gripper(1.0)
    fresh.step(300)
    assert not stacking.is_stacked(fresh)
    follow(fresh, *expert.plan(fresh))
    assert stacking.is_stacked(fresh)


def test_commands_are_those_that_codecs_decode(fresh):
    pose = fresh.ee_pose + np.array([0.03, 0, -0.05, 0, 0, 0, 0])
    codec = CartesianPose()
    step = codec.decode(np.append(pose, 1.0))
    execute(fresh, step["robot_command"])
    fresh.set_gripper(step["target_grip"])
    fresh.step(500)
    error = poses.difference(pose, fresh.ee_pose)
    assert np.linalg.norm(error[:3]) < 2e-3 and np.linalg.norm(error[3:]) < 1e-2
    assert fresh.grip > 0.95  # 1 opens

    joints = fresh.q + 0.1
    joints[3] = 1.0  # beyond its limit
    execute(fresh, {"type": "joint_pos", "positions": joints.astype(np.float32)})
    np.testing.assert_allclose(fresh.commanded_q, np.minimum(joints, HIGH), atol=1e-6)
    before = fresh.q
    execute(fresh, {"type": "joint_delta", "velocities": np.full(7, -0.05)})
    np.testing.assert_allclose(fresh.commanded_q, before - 0.05)
    execute(fresh, {"type": "reset"})
    np.testing.assert_array_equal(fresh.commanded_q, START_JOINTS)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ({"type": "jump"}, "'jump'"),
        ({}, "None"),
        ({"type": "joint_pos"}, "lacks 'positions'"),
        ({"type": "joint_pos", "positions": np.zeros(6)}, r"\(6,\)"),
        ({"type": "joint_delta", "velocities": np.full(7, np.nan)}, "not finite"),
        ({"type": "cartesian_pos", "pose": np.ones(12)}, "rotation"),
    ],
)
def test_a_command_that_no_arm_may_get_is_refused(fresh, command, message):
    before = fresh.commanded_q
    with pytest.raises(ValueError, match=message):
        execute(fresh, command)
    np.testing.assert_array_equal(fresh.commanded_q, before)


def test_both_cameras_see_the_green_cube_when_the_hand_is_above_it(fresh):
    above = np.concatenate([fresh.cube_position(GREEN) + np.array([0, 0, 0.15]), [0, 1, 0, 0]])
    fresh.move_to_pose(above)
    fresh.set_gripper(1.0)
    fresh.step(1000)
    renderer = make_renderer(fresh, width=160, height=120)
    for camera in (WRIST_CAMERA, EXTERIOR_CAMERA):
        picture = renderer.render(camera).astype(int)
        assert picture.shape == (120, 160, 3)
        green = (picture[..., 1] > 2 * picture[..., 0]) & (picture[..., 1] > 2 * picture[..., 2])
        assert green.sum() >= 10


def test_another_model_needs_the_same_names(tmp_path):
    path = tmp_path / "other.xml"
    path.write_text(MODEL_PATH.read_text().replace(SITE, "tool"))
    with pytest.raises(ValueError, match=SITE):
        FrankaWorld(path)
    path.write_text("<mujoco><")
    with pytest.raises(ValueError, match="MuJoCo can load"):
        FrankaWorld(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FrankaWorld(tmp_path / "nowhere.xml")


def test_the_environment_keeps_gymnasiums_contract():
    env = gymnasium.make("openpi/FrankaStack-v0", image_width=32, image_height=24).unwrapped
    check_env(env, skip_render_check=True)


def test_the_expert_solves_the_environment_and_codecs_read_it():
    env = FrankaStackEnv(image_width=32, image_height=24)
    observation, info = env.reset(seed=3)
    codec = get_codec("ee")
    assert codec.encode(franka_observation(observation))["prompt"] == stacking.TASK
    start_ns = env.world.time_ns
    reward = terminated = truncated = num_steps = 0
    for pose, grip in zip(*expert.plan(env.world), strict=True):
        observation, reward, terminated, truncated, info = env.step(np.append(pose, grip))
        num_steps += 1
        assert env.observation_space.contains(observation)
        if terminated or truncated:
            break
    assert (reward, terminated, info["success"]) == (1.0, True, True)
    assert abs((env.world.time_ns - start_ns) / 1e9 - num_steps / CONTROL_HZ) < 0.002


@pytest.mark.parametrize("options", [{"prompt": "dance"}, {"speed": 2}])
def test_a_reset_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=min(options)):
        FrankaStackEnv(image_width=8, image_height=8).reset(options=options)


OPENGL_CENTROIDS = """
import sys
import numpy as np
from openpi_positronic.franka.render import make_renderer
from openpi_positronic.franka.world import EXTERIOR_CAMERA, WRIST_CAMERA, FrankaWorld

world = FrankaWorld()
world.reset(np.random.default_rng(1))
try:
    renderers = [make_renderer(world, kind) for kind in ("rays", "gl")]
except RuntimeError as error:
    sys.exit(str(error))
for camera in (WRIST_CAMERA, EXTERIOR_CAMERA):
    for renderer in renderers:
        picture = renderer.render(camera).astype(int)
        green = (picture[..., 1] > 1.6 * picture[..., 0]) & (picture[..., 1] > 1.6 * picture[..., 2])
        print(*np.argwhere(green).mean(axis=0))
"""


def test_ray_cast_and_opengl_pictures_agree_on_where_the_green_cube_is():
    """Runs where EGL is installed."""
    script = [sys.executable, "-c", OPENGL_CENTROIDS]
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    run = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120)
    if run.returncode != 0 and ("OpenGL" in run.stderr or "EGL" in run.stderr):
        pytest.skip("no working EGL on this machine")
    assert run.returncode == 0, run.stderr
    rays_wrist, gl_wrist, rays_exterior, gl_exterior = np.loadtxt(run.stdout.splitlines())
    np.testing.assert_allclose(rays_wrist, gl_wrist, atol=1.0)  # pixels of 320 x 240
    np.testing.assert_allclose(rays_exterior, gl_exterior, atol=1.0)
