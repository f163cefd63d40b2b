"""The table-top world: arm, coloured blocks and plates on plain MuJoCo, ten control steps a second.

Only primitive shapes and no files: the model is built in code for the objects of a scene and cached. Finger
friction 2, the elliptic cone and impratio 10 keep a 40 g cube from creeping out of a 6 N grip; gravity
compensation lets soft position actuators hold a pose without sagging.
"""

# The MuJoCo bindings are compiled and ship no type stubs.
# pyright: reportAttributeAccessIssue=false

import functools
from dataclasses import dataclass

import mujoco
import numpy as np

from openpi_demo.tabletop import arm

CONTROL_HZ = 10
PHYSICS_STEP_S = 0.005
SUBSTEPS = round(1 / (CONTROL_HZ * PHYSICS_STEP_S))

BLOCK_COLOURS = ("red", "green", "blue")
PLATE_COLOURS = ("white", "black")
BLOCK_HALF_M = 0.020
PLATE_RADIUS_M = 0.050
PLATE_HEIGHT_M = 0.008

FRONT_CAMERA = "front"
WRIST_CAMERA = "wrist"
CAMERAS = (FRONT_CAMERA, WRIST_CAMERA)

RGBA = {
    "red": "0.86 0.10 0.10 1",
    "green": "0.10 0.66 0.16 1",
    "blue": "0.12 0.26 0.90 1",
    "white": "0.97 0.97 0.97 1",
    "black": "0.06 0.06 0.07 1",
    "table": "0.66 0.56 0.44 1",
    "link": "0.46 0.48 0.52 1",
    "joint": "0.30 0.31 0.34 1",
    "finger": "0.92 0.78 0.25 1",
}


@dataclass(frozen=True)
class Block:
    """A 40 mm cube lying on the table: colour, centre in metres, heading in radians."""

    colour: str
    x: float
    y: float
    yaw: float = 0.0


@dataclass(frozen=True)
class Plate:
    """A plate fixed to the table: colour and centre in metres."""

    colour: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """Everything that differs between two episodes of one task before anybody moves."""

    blocks: tuple[Block, ...]
    plates: tuple[Plate, ...] = ()
    tip: tuple[float, float, float] = (0.20, 0.0, 0.17)  # where the arm starts, gripper open


class TabletopWorld:
    """Physics of one scene. State and action: float32[6], joint angles (rad), gripper (0 closed, 1 open)."""

    def __init__(self, scene: Scene):
        self.reset(scene)

    def reset(self, scene: Scene) -> None:
        """Puts the arm and the blocks of `scene` in place, at rest."""
        self.scene = scene
        self.model = build_model(tuple(block.colour for block in scene.blocks), scene.plates)
        self.data = mujoco.MjData(self.model)
        self._joint_address = np.array([self.model.joint(name).qposadr[0] for name in arm.JOINT_NAMES])
        self._finger_address = np.array([self.model.joint(name).qposadr[0] for name in _FINGERS])
        start = arm.target_for_tip(np.array(scene.tip), gripper=1.0)
        self.data.qpos[self._joint_address] = start[: arm.NUM_JOINTS]
        self.data.qpos[self._finger_address] = arm.FINGER_TRAVEL_M
        for block in scene.blocks:
            address = self.model.joint(f"block_{block.colour}").qposadr[0]
            half = block.yaw / 2
            self.data.qpos[address : address + 7] = [
                *(block.x, block.y, BLOCK_HALF_M),
                *(np.cos(half), 0.0, 0.0, np.sin(half)),
            ]
        self._set_targets(start)
        mujoco.mj_forward(self.model, self.data)

    def step(self, action: np.ndarray) -> None:
        """Holds the targets `action` float32[6] for one control period, clipped to the limits."""
        self._set_targets(np.clip(action, arm.STATE_LOW, arm.STATE_HIGH))
        mujoco.mj_step(self.model, self.data, nstep=SUBSTEPS)
        mujoco.mj_forward(self.model, self.data)  # positions that cameras and success rules read

    @property
    def state(self) -> np.ndarray:
        """float32[6], measured, a new array."""
        gripper = self.data.qpos[self._finger_address].mean() / arm.FINGER_TRAVEL_M
        state = np.append(self.data.qpos[self._joint_address], np.clip(gripper, 0.0, 1.0))
        return state.astype(np.float32)

    def block_position(self, colour: str) -> np.ndarray:
        """Centre of a block, float64[3] in metres, a new array."""
        return self.data.body(f"block_{colour}").xpos.copy()

    def block_geom_id(self, colour: str) -> int:
        return self.model.geom(f"block_{colour}").id

    def plate_position(self, colour: str) -> np.ndarray:
        """Centre of a plate, float64[3] in metres, a new array."""
        return self.model.geom(f"plate_{colour}").pos.copy()

    def plate_geom_id(self, colour: str) -> int:
        return self.model.geom(f"plate_{colour}").id

    def camera_pose(self, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """Position float64[3], rotation float64[3, 3]; columns: image right, image up, out of the scene."""
        view = self.data.camera(camera)
        return view.xpos.copy(), view.xmat.reshape(3, 3).copy()

    def camera_fovy_rad(self, camera: str) -> float:
        return float(np.deg2rad(self.model.camera(camera).fovy[0]))

    def _set_targets(self, action: np.ndarray) -> None:
        finger = float(action[-1]) * arm.FINGER_TRAVEL_M
        self.data.ctrl[:] = [*action[: arm.NUM_JOINTS], finger, finger]


_FINGERS = ("finger_left", "finger_right")


@functools.lru_cache(maxsize=64)
def build_model(block_colours: tuple[str, ...], plates: tuple[Plate, ...]) -> mujoco.MjModel:
    """Compiles the model that holds these objects. Shared by all worlds: never write to it."""
    blocks = "".join(_block_xml(colour) for colour in block_colours)
    return mujoco.MjModel.from_xml_string(_WORLD_XML.format(blocks=blocks, plates="".join(map(_plate_xml, plates))))


def _block_xml(colour: str) -> str:
    return f"""
    <body name="block_{colour}">
      <freejoint name="block_{colour}"/>
      <geom name="block_{colour}" type="box" size="{BLOCK_HALF_M} {BLOCK_HALF_M} {BLOCK_HALF_M}" mass="0.04"
            condim="4" friction="1 0.01 0.0001" rgba="{RGBA[colour]}"/>
    </body>"""


def _plate_xml(plate: Plate) -> str:
    return f"""
    <geom name="plate_{plate.colour}" type="cylinder" pos="{plate.x} {plate.y} {PLATE_HEIGHT_M / 2}"
          size="{PLATE_RADIUS_M} {PLATE_HEIGHT_M / 2}" rgba="{RGBA[plate.colour]}"/>"""


def _look_at(position: tuple[float, float, float], target: tuple[float, float, float], up: tuple) -> str:
    """MJCF attributes of a camera at `position` whose axis runs through `target`."""
    forward = np.subtract(target, position)
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    upward = np.cross(right, forward)
    upward /= np.linalg.norm(upward)
    axes = " ".join(f"{value:.8f}" for value in (*right, *upward))
    return f'pos="{position[0]} {position[1]} {position[2]}" xyaxes="{axes}"'


def _joint_range(index: int) -> str:
    return f'range="{arm.STATE_LOW[index]:.4f} {arm.STATE_HIGH[index]:.4f}"'


def _finger_xml(name: str, side: int) -> str:
    return f"""
              <body name="{name}" pos="0.06 0 0">
                <joint name="{name}" type="slide" axis="0 {side} 0" range="0 {arm.FINGER_TRAVEL_M}"
                       damping="1"/>
                <geom type="box" pos="0.041 {side * 0.005} 0" size="0.041 0.005 0.012" mass="0.03" condim="4"
                      friction="2 0.02 0.0001" rgba="{RGBA["finger"]}"/>
              </body>"""


_FRONT_VIEW = _look_at((0.52, 0.0, 0.60), (0.22, 0.0, 0.0), up=(0, 0, 1))
# In the hand's frame x runs along the fingers and z away from the arm, so this camera rides ahead of the hand
# at the height of the wrist and looks down: the finger tips and what is between them fill the lower half, the
# table ahead of them the rest.
_WRIST_VIEW = _look_at((0.0, 0.0, 0.07), (arm.HAND_M, 0.0, 0.035), up=(0, 0, 1))

_WORLD_XML = f"""
<mujoco model="tabletop">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{PHYSICS_STEP_S}" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <visual>
    <quality shadowsize="512" offsamples="0"/>
    <global offwidth="640" offheight="640"/>
    <headlight ambient="0.4 0.4 0.4" diffuse="0.3 0.3 0.3" specular="0 0 0"/>
  </visual>
  <default>
    <joint armature="0.01" damping="0.3"/>
    <default class="arm"><geom type="capsule" contype="0" conaffinity="0" rgba="{RGBA["link"]}"/></default>
  </default>
  <worldbody>
    <light pos="0.3 0.2 1.2" dir="-0.1 -0.2 -1" directional="true" diffuse="0.5 0.5 0.5"/>
    <camera name="{FRONT_CAMERA}" {_FRONT_VIEW} fovy="36"/>
    <geom name="table" type="box" pos="0.25 0 -0.02" size="0.7 0.7 0.02" friction="1 0.01 0.0001"
          rgba="{RGBA["table"]}"/>
    <geom class="arm" type="cylinder" pos="0 0 0.03" size="0.055 0.03" rgba="{RGBA["joint"]}"/>
    <body name="base" pos="0 0 {arm.SHOULDER_HEIGHT_M}" gravcomp="1">
      <joint name="base_yaw" axis="0 0 1" {_joint_range(0)}/>
      <geom class="arm" type="cylinder" pos="0 0 -0.02" size="0.04 0.02" mass="0.3" rgba="{RGBA["joint"]}"/>
      <body name="upper_arm" gravcomp="1">
        <joint name="shoulder" axis="0 -1 0" {_joint_range(1)}/>
        <geom class="arm" fromto="0 0 0 {arm.UPPER_ARM_M} 0 0" size="0.025" mass="0.3"/>
        <body name="forearm" pos="{arm.UPPER_ARM_M} 0 0" gravcomp="1">
          <joint name="elbow" axis="0 -1 0" {_joint_range(2)}/>
          <geom class="arm" fromto="0 0 0 {arm.FOREARM_M} 0 0" size="0.020" mass="0.2"/>
          <body name="wrist" pos="{arm.FOREARM_M} 0 0" gravcomp="1">
            <joint name="wrist_pitch" axis="0 -1 0" {_joint_range(3)}/>
            <geom class="arm" fromto="0 0 0 0.02 0 0" size="0.022" mass="0.05" rgba="{RGBA["joint"]}"/>
            <body name="hand" gravcomp="1">
              <joint name="wrist_roll" axis="1 0 0" {_joint_range(4)}/>
              <geom class="arm" type="box" pos="0.05 0 0" size="0.012 0.05 0.014" mass="0.1"
                    rgba="{RGBA["joint"]}"/>
              <camera name="{WRIST_CAMERA}" {_WRIST_VIEW} fovy="70"/>
              {_finger_xml("finger_left", 1)}{_finger_xml("finger_right", -1)}
            </body>
          </body>
        </body>
      </body>
    </body>
    {{plates}}{{blocks}}
  </worldbody>
  <actuator>
    <position joint="base_yaw" kp="60" kv="4"/>
    <position joint="shoulder" kp="60" kv="4"/>
    <position joint="elbow" kp="60" kv="4"/>
    <position joint="wrist_pitch" kp="30" kv="2"/>
    <position joint="wrist_roll" kp="15" kv="1"/>
    <position joint="finger_left" kp="300" forcerange="-6 6"/>
    <position joint="finger_right" kp="300" forcerange="-6 6"/>
  </actuator>
</mujoco>"""
