"""The table-top world: geometry, pictures, the expert, demonstrations and the gymnasium environment."""

import json
import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_demo.tabletop import (
    PICK,
    PLACE,
    PROMPTS,
    REACH,
    TabletopEnv,
    arm,
    expert,
    record,
    tabletop_observation,
    tasks,
)
from openpi_demo.tabletop.render import RayRenderer, make_renderer, project
from openpi_demo.tabletop.world import CAMERAS, Block, Plate, Scene, TabletopWorld

SCENE = Scene((Block("red", 0.25, 0.06), Block("green", 0.22, -0.08), Block("blue", 0.30, -0.02)))
PLATES = (Plate("white", 0.22, 0.17), Plate("black", 0.22, -0.17))
CHANNEL = {"red": 0, "green": 1, "blue": 2}


def follow(world: TabletopWorld, goal: tasks.Goal) -> None:
    for action in expert.actions(expert.plan(world.scene, goal)):
        world.step(action)


# --- the arm


@given(
    radius=st.floats(0.15, 0.31),
    bearing=st.floats(-0.9, 0.9),
    height=st.floats(0.01, 0.16),
)
def test_inverse_kinematics_undoes_forward_kinematics(radius, bearing, height):
    tip = np.array([radius * np.cos(bearing), radius * np.sin(bearing), height])
    joints = arm.joints_for_tip(tip)
    np.testing.assert_allclose(arm.tip_for_joints(joints), tip, atol=1e-9)
    assert np.all(joints > arm.STATE_LOW[:5])
    assert np.all(joints < arm.STATE_HIGH[:5])


def test_the_fingers_of_the_physical_model_meet_where_the_kinematics_say():
    world = TabletopWorld(SCENE)
    hand = world.data.body("hand")
    tip = hand.xpos + hand.xmat.reshape(3, 3) @ [arm.HAND_M, 0.0, 0.0]
    np.testing.assert_allclose(tip, SCENE.tip, atol=1e-6)


def test_the_open_hand_stays_parallel_to_the_table_whatever_the_bearing():
    for bearing in (-0.6, 0.0, 0.6):
        tip = (0.22 * np.cos(bearing), 0.22 * np.sin(bearing), 0.1)
        world = TabletopWorld(Scene(SCENE.blocks, tip=tip))
        hand = world.data.body("hand").xmat.reshape(3, 3)
        np.testing.assert_allclose(hand[:, 0], [0, 0, -1], atol=1e-6)
        np.testing.assert_allclose(hand[:, 1], [0, 1, 0], atol=1e-6)
        assert world.state[-1] == 1.0


def test_a_point_out_of_reach_gives_finite_joints():
    assert np.isfinite(arm.joints_for_tip(np.array([2.0, 0.0, 0.5]))).all()


def test_the_arm_arrives_at_its_targets_and_stays_there():
    world = TabletopWorld(SCENE)
    target = arm.target_for_tip(np.array([0.24, -0.02, 0.12]), gripper=0.5)
    for _ in range(15):
        world.step(target)
    np.testing.assert_allclose(world.state, target, atol=0.01)


# --- pictures


@pytest.mark.parametrize("camera", CAMERAS)
def test_pictures_are_rgb_bytes_and_the_same_twice(camera):
    picture = RayRenderer(64).render(TabletopWorld(SCENE), camera)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, RayRenderer(64).render(TabletopWorld(SCENE), camera))


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("colour", CHANNEL)
def test_a_block_shows_in_its_colour_where_its_centre_projects(camera, colour):
    world = TabletopWorld(SCENE)
    pixel = project(world, camera, world.block_position(colour), 64)
    assert pixel is not None
    column, row = pixel.astype(int)
    shown = RayRenderer(64).render(world, camera)[row, column].astype(int)
    others = np.delete(shown, CHANNEL[colour])
    assert shown[CHANNEL[colour]] > 2 * others.max()


def test_the_wrist_camera_sees_what_the_fingers_hold():
    world = TabletopWorld(SCENE)
    follow(world, tasks.Goal("red"))
    _, ids = RayRenderer(64).render_with_ids(world, "wrist")
    rows, columns = np.nonzero(ids == world.block_geom_id("red"))
    assert len(rows) > 100
    assert 20 < columns.mean() < 44
    finger_ids = [i for i in range(world.model.ngeom) if "finger" in world.model.body(world.model.geom_bodyid[i]).name]
    assert all(np.count_nonzero(ids == i) > 20 for i in finger_ids)


def test_points_behind_or_beside_the_camera_do_not_project():
    world = TabletopWorld(SCENE)
    assert project(world, "front", np.array([2.0, 0.0, 2.0]), 64) is None
    assert project(world, "front", np.array([0.22, 1.0, 0.0]), 64) is None


def test_the_look_of_a_picture_does_not_depend_on_its_size():
    small = RayRenderer(32).render(TabletopWorld(SCENE), "front").astype(float)
    large = RayRenderer(96).render(TabletopWorld(SCENE), "front").astype(float)
    averaged = large.reshape(32, 3, 32, 3, 3).mean(axis=(1, 3))
    assert np.abs(averaged - small).mean() < 6  # edges differ, surfaces do not


OPENGL_CENTROIDS = """
import json, sys
import numpy as np
from openpi_demo.tabletop.render import make_renderer
from openpi_demo.tabletop.world import Block, Scene, TabletopWorld

world = TabletopWorld(Scene((Block("red", 0.25, 0.06), Block("blue", 0.22, -0.08))))
centroids = []
for kind in ("rays", "gl"):
    try:
        renderer = make_renderer(kind, 128)
        pictures = [renderer.render(world, camera).astype(int) for camera in ("front", "wrist")]
    except RuntimeError as error:
        sys.exit(str(error))
    for picture in pictures:
        is_red = picture[..., 0] > 2.5 * picture[..., 1:].max(axis=-1)
        centroids.append(np.argwhere(is_red).mean(axis=0).tolist())
print(json.dumps(centroids))
"""


def test_ray_cast_and_opengl_pictures_agree_on_where_things_are():
    """Independent check of the camera model; runs where EGL is installed."""
    run = subprocess.run(
        [sys.executable, "-c", OPENGL_CENTROIDS],
        env={**os.environ, "MUJOCO_GL": "egl"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if run.returncode != 0 and ("OpenGL" in run.stderr or "EGL" in run.stderr):
        pytest.skip("no working EGL on this machine")
    assert run.returncode == 0, run.stderr
    rays_front, rays_wrist, gl_front, gl_wrist = np.array(json.loads(run.stdout))
    np.testing.assert_allclose(rays_front, gl_front, atol=1.0)  # pixels of 128
    np.testing.assert_allclose(rays_wrist, gl_wrist, atol=1.0)


def test_an_unknown_renderer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"renderer='crayons'.*'gl', 'rays'"):
        make_renderer("crayons")


# --- tasks


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), task=st.sampled_from([PICK, REACH, PLACE]))
def test_drawn_scenes_keep_blocks_apart_and_within_reach(seed, task):
    scene = tasks.sample_scene(np.random.default_rng(seed), task, num_blocks=3)
    xy = np.array([[block.x, block.y] for block in scene.blocks])
    gaps = np.linalg.norm(xy[:, None] - xy[None], axis=-1)[np.triu_indices(3, 1)]
    assert gaps.min() >= tasks.MIN_BLOCK_DISTANCE_M
    assert np.linalg.norm(xy, axis=1).max() < 0.311
    assert len(scene.plates) == 2 or (task == PICK and not scene.plates)


@pytest.mark.parametrize("prompt", PROMPTS[PICK] + PROMPTS[REACH] + PROMPTS[PLACE])
def test_prompts_and_goals_are_inverse(prompt):
    assert tasks.parse_prompt(prompt).prompt == prompt
    assert tasks.parse_prompt(prompt.capitalize() + ".").prompt == prompt


def test_an_unknown_prompt_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"make coffee.*pick up the red block"):
        tasks.parse_prompt("make coffee")


def test_one_scene_and_two_prompts_want_different_motions():
    red, green = (expert.actions(expert.plan(SCENE, tasks.Goal(colour))) for colour in ("red", "green"))
    assert np.abs(red[4] - green[4]).max() > 0.3


# --- the expert


@pytest.mark.parametrize("task", [PICK, REACH, PLACE])
def test_the_expert_does_what_every_prompt_says_and_nothing_else(task):
    for seed, goal in enumerate(tasks.GOALS[task]):
        world = TabletopWorld(tasks.sample_scene(np.random.default_rng(seed), task, num_blocks=3))
        assert not tasks.is_success(world, goal)
        follow(world, goal)
        achieved = [other for other in tasks.GOALS[task] if tasks.is_success(world, other)]
        assert achieved == [goal]


def test_the_expert_moves_at_its_pace():
    path = expert.plan(Scene(SCENE.blocks, PLATES), tasks.Goal("blue", "white"))
    steps = np.linalg.norm(np.diff(path[:, :3], axis=0), axis=1)
    assert steps.max() <= expert.STEP_M + 1e-9


def test_a_goal_that_the_scene_lacks_is_named():
    with pytest.raises(KeyError, match=r"'blue'.*found: red"):
        expert.plan(Scene((Block("red", 0.25, 0.0),)), tasks.Goal("blue"))


# --- demonstrations


@pytest.fixture(scope="module")
def demonstrations():
    return list(record.demonstrations(PICK, range(3), num_blocks=3))


def test_a_scene_is_recorded_once_per_prompt_with_equal_first_pictures(demonstrations):
    assert [d.prompt for d in demonstrations[:3]] == list(PROMPTS[PICK])
    first = [d.frames["front"][0] for d in demonstrations[:3]]
    np.testing.assert_array_equal(first[0], first[1])
    np.testing.assert_array_equal(first[0], first[2])


def test_demonstrations_have_aligned_columns_of_the_documented_types(demonstrations):
    for demonstration in demonstrations:
        t = len(demonstration)
        assert 12 <= t <= 40
        for camera in CAMERAS:
            assert demonstration.frames[camera].shape == (t, 64, 64, 3)
            assert demonstration.frames[f"{camera}_target_px"].shape == (t, 2)
            assert demonstration.frames[f"{camera}_target_visible"].dtype == np.bool_
        assert demonstration.frames["state"].dtype == demonstration.frames["action"].dtype == np.float32


def test_labels_stay_clean_where_the_motion_is_disturbed():
    scene = tasks.sample_scene(np.random.default_rng(5), PICK, num_blocks=2)
    goal = tasks.goals_in(scene, PICK)[0]
    clean = expert.actions(expert.plan(scene, goal))
    recorded = [record.record_episode(scene, goal, seed=seed) for seed in range(6)]
    for demonstration in recorded:
        np.testing.assert_array_equal(demonstration.frames["action"], clean)
    assert len({demonstration.frames["state"].tobytes() for demonstration in recorded}) > 2


def test_recording_is_reproducible_and_independent_of_workers(demonstrations):
    parallel = list(record.demonstrations(PICK, range(3), num_blocks=3, num_workers=1))
    assert len(parallel) == len(demonstrations)
    for one, other in zip(demonstrations, parallel, strict=True):
        assert one.prompt == other.prompt
        for name in one.frames:
            np.testing.assert_array_equal(one.frames[name], other.frames[name])


def test_the_labelled_patch_shows_the_asked_block(demonstrations):
    for demonstration in demonstrations:
        channel = CHANNEL[demonstration.prompt.split()[-2]]
        for camera in CAMERAS:
            pixels = demonstration.frames[f"{camera}_target_px"]
            visible = demonstration.frames[f"{camera}_target_visible"]
            patches = record.patch_labels(pixels, visible, image_size=64, patch_size=16)
            row, column = divmod(int(patches[0]), 4)
            patch = demonstration.frames[camera][0, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            dominance = patch[..., channel].astype(int) - np.delete(patch, channel, axis=-1).max(axis=-1)
            assert dominance.max() > 60


def test_patches_are_numbered_by_rows_and_hidden_targets_are_ignored():
    pixels = np.array([[0.0, 0.0], [63.9, 0.0], [20.0, 40.0], [5.0, 5.0]], np.float32)
    labels = record.patch_labels(pixels, np.array([True, True, True, False]), image_size=64, patch_size=16)
    assert labels.tolist() == [0, 3, 9, -1]


def test_lerobot_columns_match_the_declared_features(demonstrations):
    features = record.lerobot_features(64)
    frames = record.lerobot_frames(demonstrations[0])
    assert features.keys() == frames.keys()
    for name, feature in features.items():
        assert list(frames[name].shape[1:]) == feature["shape"]


# --- the environment


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")  # actions are radians, like a real arm's
@pytest.mark.parametrize("name", ["openpi/TabletopPick-v0", "openpi/TabletopPlace-v0"])
def test_gymnasium_accepts_the_registered_environments(name):
    env = gymnasium.make(name, render_mode="rgb_array")
    check_env(env.unwrapped)


def test_the_expert_solves_an_episode_through_the_environment():
    env = TabletopEnv(PLACE)
    observation, info = env.reset(seed=3, options={"prompt": "put the green block on the black plate"})
    assert observation["prompt"] == "put the green block on the black plate"
    assert not info["success"]
    rewards, successes = [], []
    terminated = truncated = False
    for action in expert.actions(expert.plan(env.world.scene, env.goal)):
        _, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        successes.append(info["success"])
        if terminated:
            break
    assert terminated
    assert not truncated
    assert successes[-3:] == [False, True, True]  # it has to last
    assert sum(rewards) == 1.0


def test_an_episode_in_which_nothing_happens_is_cut_off():
    env = TabletopEnv(PICK, image_size=8, max_steps=5)
    observation, _ = env.reset(seed=0)
    outcomes = [env.step(observation["state"]) for _ in range(5)]
    assert [truncated for _, _, _, truncated, _ in outcomes] == [False] * 4 + [True]
    assert not any(terminated for _, _, terminated, _, _ in outcomes)


def test_the_same_seed_gives_the_same_episode():
    one, other, third = (TabletopEnv(image_size=16).reset(seed=seed)[0] for seed in (7, 7, 8))
    assert one["prompt"] == other["prompt"]
    np.testing.assert_array_equal(one["images"]["front"], other["images"]["front"])
    assert not np.array_equal(one["images"]["front"], third["images"]["front"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promt": "pick up the red block"}, "'promt' is unknown; expected prompt"),
        ({"prompt": "put the red block on the white plate"}, "this scene only allows: pick up the red"),
        ({"prompt": "dance"}, "prompt is 'dance'"),
        ({"num_blocks": 4}, "num_blocks is 4"),
    ],
)
def test_bad_reset_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TabletopEnv(PICK, image_size=8).reset(seed=0, options=options)


@pytest.mark.parametrize(("action", "message"), [(np.zeros(7), r"shape \(7,\)"), (np.full(6, np.nan), "not finite")])
def test_bad_actions_are_refused(action, message):
    env = TabletopEnv(image_size=8)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)


def test_using_the_environment_before_reset_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        TabletopEnv(image_size=8).step(np.zeros(6, np.float32))


def test_the_policy_sees_only_what_a_robot_client_would_send():
    observation, _ = TabletopEnv(image_size=16).reset(seed=0)
    sent = tabletop_observation(observation)
    assert set(sent) == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
    assert sent["observation/image"] is observation["images"]["front"]
