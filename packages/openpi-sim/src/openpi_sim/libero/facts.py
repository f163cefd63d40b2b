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
        arm: positions of the joints 2 (the shoulder) to 7, then of the hand, [7, 3].
        things: name -> [19]: position, rotation matrix, then centre and half size of its box in its own frame, and 0.
            Of objects, fixtures, and the regions that goals name.
        parts: name -> [n, 15] of what things collide with: centre, rotation matrix and half size of each one's box.
        camera: of the picture from outside: position, rotation matrix, vertical field of view in rad, [13].
    """
    model, data = env.sim.model._model, env.sim.data._data
    mujoco.mj_kinematics(model, data)
    site = model.site(_HAND).id
    gripper = [data.qpos[model.joint(f"gripper0_finger_joint{i}").qposadr[0]] for i in (1, 2)]
    parts = {name: _parts(model, data, index) for name, index in env.obj_body_id.items()}
    things = {name: _body(data, index, parts[name]) for name, index in env.obj_body_id.items()}
    things |= {name: _region(model, data, env, name) for name in env.object_sites_dict}
    camera = model.camera("agentview").id
    return {
        "hand": np.concatenate([data.site_xpos[site], data.site_xmat[site]]),
        "arm": np.array([*(data.body(f"robot0_link{i}").xpos for i in range(2, 8)), data.site_xpos[site]]),
        "fingers": np.array(gripper),
        "goal": [list(predicate) for predicate in env.parsed_problem["goal_state"]],
        "done": [bool(env._eval_predicate(predicate)) for predicate in env.parsed_problem["goal_state"]],
        "things": things,
        "parts": parts,
        "camera": np.concatenate([data.cam_xpos[camera], data.cam_xmat[camera], [np.deg2rad(model.cam_fovy[camera])]]),
    }


def _parts(model: mujoco.MjModel, data: mujoco.MjData, body: int) -> np.ndarray:
    found = [i for i in range(model.ngeom) if _collides(model, i) and _is_within(model, model.geom_bodyid[i], body)]
    rotations = data.geom_xmat[found].reshape(-1, 3, 3)
    centres = data.geom_xpos[found] + np.einsum("nij,nj->ni", rotations, model.geom_aabb[found, :3])
    return np.concatenate([centres, data.geom_xmat[found].reshape(-1, 9), model.geom_aabb[found, 3:]], axis=1)


def _body(data: mujoco.MjData, body: int, parts: np.ndarray) -> np.ndarray:
    position, rotation = data.xpos[body], data.xmat[body].reshape(3, 3)
    centre = half = np.zeros(3)
    if len(parts):
        corners = parts[:, None, :3] + (_CORNERS * parts[:, None, 12:]) @ parts[:, 3:12].reshape(-1, 3, 3).swapaxes(
            1, 2
        )
        local = ((corners - position) @ rotation).reshape(-1, 3)
        centre, half = (local.max(0) + local.min(0)) / 2, (local.max(0) - local.min(0)) / 2
    return np.concatenate([position, rotation.ravel(), centre, half, [0.0]])


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
