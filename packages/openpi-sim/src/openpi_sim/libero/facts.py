"""What only the simulator knows, for the expert: where things are, how large, and what the goal is."""

# LIBERO and robosuite ship no type stubs; the MuJoCo bindings are compiled and ship none.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import mujoco
import numpy as np

_HAND = "gripper0_grip_site"


def look(env: object) -> dict[str, object]:
    """Facts of one moment, all float64 or texts, to be sent.

    Returns:
        hand: position, then the rotation matrix row by row, [12].
        fingers: [2], m.
        goal: predicates, such as [["in", "milk_1", "basket_1_contain_region"]].
        done: whether each is met.
        things: name -> [19]: position, rotation matrix, then centre and half size of its box in its own frame, and 0.
            Of objects, fixtures, and the regions that goals name.
        camera: of the picture from outside: position, rotation matrix, vertical field of view in rad, [13].
    """
    model, data = env.sim.model._model, env.sim.data._data
    mujoco.mj_kinematics(model, data)
    site = model.site(_HAND).id
    gripper = [data.qpos[model.joint(f"gripper0_finger_joint{i}").qposadr[0]] for i in (1, 2)]
    things = {name: _body(model, data, index) for name, index in env.obj_body_id.items()}
    things |= {name: _region(model, data, env, name) for name in env.object_sites_dict}
    camera = model.camera("agentview").id
    return {
        "hand": np.concatenate([data.site_xpos[site], data.site_xmat[site]]),
        "fingers": np.array(gripper),
        "goal": [list(predicate) for predicate in env.parsed_problem["goal_state"]],
        "done": [bool(env._eval_predicate(predicate)) for predicate in env.parsed_problem["goal_state"]],
        "things": things,
        "camera": np.concatenate([data.cam_xpos[camera], data.cam_xmat[camera], [np.deg2rad(model.cam_fovy[camera])]]),
    }


def _body(model: mujoco.MjModel, data: mujoco.MjData, body: int) -> np.ndarray:
    position, rotation = data.xpos[body], data.xmat[body].reshape(3, 3)
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for geom in range(model.ngeom):
        if not _is_within(model, model.geom_bodyid[geom], body) or not _collides(model, geom):
            continue
        corners = model.geom_aabb[geom, :3] + model.geom_aabb[geom, 3:] * _CORNERS
        world = corners @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
        local = (world - position) @ rotation
        low, high = np.minimum(low, local.min(0)), np.maximum(high, local.max(0))
    if not np.isfinite(low).all():
        low = high = np.zeros(3)
    return np.concatenate([position, rotation.ravel(), (low + high) / 2, (high - low) / 2, [0.0]])


def _region(model: mujoco.MjModel, data: mujoco.MjData, env: object, name: str) -> np.ndarray:
    site = model.site(name).id
    size = np.ravel(np.asarray(env.object_sites_dict[name].size, np.float64))
    half = np.zeros(3)
    half[: len(size)] = size[:3]
    return np.concatenate([data.site_xpos[site], data.site_xmat[site], np.zeros(3), half, [1.0]])


_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])


def _is_within(model: mujoco.MjModel, body: int, ancestor: int) -> bool:
    while body not in (0, ancestor):
        body = model.body_parentid[body]
    return body == ancestor


def _collides(model: mujoco.MjModel, geom: int) -> bool:
    return bool(model.geom_contype[geom] or model.geom_conaffinity[geom])
