"""ALOHA: two ViperX arms by the topics of Interbotix's `xs_sdk`, under ROS 1 or ROS 2.

    /<arm>/joint_states               sensor_msgs/JointState, by joint names       -> state
    /<camera>                         sensor_msgs/Image or aloha/RGBGrayscaleImage -> images/<camera>
    /<arm>/commands/joint_group       interbotix_xs_msgs/JointGroupCommand         <- six joints, rad
    /<arm>/commands/joint_single      interbotix_xs_msgs/JointSingleCommand        <- the gripper's joint, rad

State and action, 14: left arm 6 joints, left gripper, right arm 6 joints, right gripper; grippers 0 closed .. 1 open. A
gripper is measured as the place of its finger, and commanded as the angle of its motor: two scales, on purpose.
"""

import dataclasses
from typing import Any, Callable, List, Mapping, Optional, Sequence

import numpy as np
from typing_extensions import Protocol

from openpi_client.base_policy import Observation
from openpi_client.realtime import Limits, Robot
from openpi_client.robots import pictures
from openpi_client.robots.cameras import Latest
from openpi_client.robots.motion import follow

CAMERAS = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
NAMES = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in (*JOINTS, "gripper"))
# Of one arm, rad.
RESET_POSE = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0)
RATE_HZ = 50.0

IMAGE_TYPES = ("sensor_msgs/Image", "aloha/RGBGrayscaleImage")

_GRIPPERS = (6, 13)
# Of the vx300s, by its description: joints in rad. Grippers may be told to press a little beyond their ends.
_LOW = (*(-np.pi, -1.8500, -1.7627, -np.pi, -1.8675, -np.pi), -0.25) * 2
_HIGH = (*(np.pi, 1.2566, 1.6057, np.pi, 2.2340, np.pi), 1.25) * 2
_MAX_SPEED = (*(np.pi,) * 6, np.inf) * 2
# Not what the arms can, but what a person beside them expects.
_RESET_SPEED = np.array((*(1.0,) * 6, np.inf) * 2)


@dataclasses.dataclass(frozen=True)
class Gripper:
    """The ends of a follower's gripper.

    Attributes:
        closed_m, open_m: where a finger is.
        closed_rad, open_rad: where its motor is.
    """

    closed_m: float
    open_m: float
    closed_rad: float
    open_rad: float

    def measured(self, finger_m: float) -> float:
        """0 closed .. 1 open."""
        return (finger_m - self.closed_m) / (self.open_m - self.closed_m)

    def commanded(self, opening: float) -> float:
        """rad."""
        return opening * (self.open_rad - self.closed_rad) + self.closed_rad


GRIPPERS = {
    "aloha": Gripper(closed_m=0.01844, open_m=0.05800, closed_rad=-0.6213, open_rad=1.4910),
    # ALOHA 2: `FOLLOWER_GRIPPER_*` of Interbotix's package.
    "aloha2": Gripper(closed_m=0.0440, open_m=0.0579, closed_rad=0.6197, open_rad=1.6214),
}


def checked_pose(pose: object) -> np.ndarray:
    """float64[6] of one arm, rad; of a server's metadata, which may hold anything.

    Raises:
        ValueError: it is no pose that the arm can have.
    """
    try:
        angles = np.array(pose, np.float64)
    except (TypeError, ValueError):
        angles = np.zeros(0)
    if angles.shape != (len(JOINTS),) or not np.isfinite(angles).all():
        raise ValueError(f"reset_pose is {pose!r}; expected {len(JOINTS)} angles in rad: {', '.join(JOINTS)}")
    for name, angle, low, high in zip(JOINTS, angles, _LOW, _HIGH):
        if not low <= angle <= high:
            raise ValueError(f"reset_pose has {name} at {angle:g} rad; the arm can {low:.4g} to {high:.4g}")
    return angles


class Topics(Protocol):
    """ROS, as much of it as is needed; message types are written `package/Name`."""

    def subscribe(self, topic: str, kinds: Sequence[str], callback: Callable[[object], None]) -> None:
        """Raises TimeoutError if nobody publishes the topic, ValueError if its type is none of `kinds`."""
        ...

    def publisher(self, topic: str, kind: str) -> Callable[..., None]:
        """A function that publishes a message with the given fields. It does not wait."""
        ...

    def call(self, service: str, kind: str, **fields: object) -> None:
        """Raises TimeoutError if nobody answers."""
        ...

    def close(self) -> None: ...


def _stamp_of(message: Any) -> Optional[float]:
    """Seconds, by which a driver that goes on publishing what it had when it lost its arm or camera is
    told from one that works; None = it does not stamp."""
    stamp = getattr(getattr(message, "header", None), "stamp", None)
    parts = [getattr(stamp, one, getattr(stamp, two, 0)) for one, two in (("sec", "secs"), ("nanosec", "nsecs"))]
    return parts[0] + 1e-9 * parts[1] if any(parts) else None


class AlohaRobot(Robot):
    """Two arms and up to four cameras."""

    action_names = NAMES
    state_names: Mapping[str, Sequence[str]] = {"state": NAMES}
    rate_hz = RATE_HZ
    holds = "stay"
    limits = Limits(low=_LOW, high=_HIGH, max_speed=_MAX_SPEED)

    def __init__(
        self,
        topics: Topics,
        *,
        arms: Sequence[str] = ("puppet_left", "puppet_right"),
        camera_topics: Optional[Mapping[str, str]] = None,
        gripper: Gripper = GRIPPERS["aloha"],
        reset_pose: Sequence[float] = RESET_POSE,
        prompt: Optional[str] = None,
    ) -> None:
        """
        Args:
            arms: names of the left and the right one.
            topics: closed with the robot, and where it cannot be made.
            camera_topics: by the names that the policy knows; None = the four of `CAMERAS`, `/<name>`.
            reset_pose: of each arm, rad[6].
            prompt: None = the policy's own.
        Raises:
            TimeoutError: an arm or a camera is silent.
            ValueError: a topic has another type, or the reset pose is none.
        """
        self._topics, self._arms, self._gripper, self._prompt = topics, tuple(arms), gripper, prompt
        places = {name: f"/{name}" for name in CAMERAS} if camera_topics is None else camera_topics
        try:
            self._reset_pose = checked_pose(reset_pose)
            self._joints = [self._latest(f"/{arm}/joint_states", ("sensor_msgs/JointState",)) for arm in arms]
            self._cameras = {name: self._latest(topic, IMAGE_TYPES) for name, topic in places.items()}
            for latest in (*self._joints, *self._cameras.values()):
                latest.wait()
            self._groups = [self._publisher(arm, "joint_group", "JointGroupCommand") for arm in arms]
            self._singles = [self._publisher(arm, "joint_single", "JointSingleCommand") for arm in arms]
        except BaseException:
            topics.close()
            raise

    def observe(self) -> Observation:
        """An arm or a camera that is silent is None; then the observation is not sent."""
        messages = {name: camera.get() for name, camera in self._cameras.items()}
        images = {name: None if message is None else pictures.of_ros(message) for name, message in messages.items()}
        prompt = {} if self._prompt is None else {"prompt": self._prompt}
        state = self._measured()
        return {"state": None if state is None else state.astype(np.float32), "images": images, **prompt}

    def pose(self) -> np.ndarray:
        """Raises RuntimeError: an arm is silent."""
        state = self._measured()
        if state is None:
            raise RuntimeError(f"nothing new from {' or '.join(self._arms)}: is the driver (xs_sdk) running?")
        return state

    def apply(self, action: np.ndarray) -> None:
        for publish, joints in zip(self._groups, (action[:6], action[7:13])):
            publish(name="arm", cmd=[float(angle) for angle in joints])
        for publish, opening in zip(self._singles, action[list(_GRIPPERS)]):
            publish(name="gripper", cmd=float(self._gripper.commanded(opening)))

    def reset(self) -> None:
        """Wakes the motors, goes to the reset pose, closes and opens the grippers."""
        for arm in self._arms:
            self._wake(arm)
        pose = self.pose()
        there = pose.copy()
        there[:6] = there[7:13] = self._reset_pose
        closed, opened = there.copy(), there.copy()
        closed[list(_GRIPPERS)], opened[list(_GRIPPERS)] = 0.0, 1.0
        moves = [(there, 1.0), (closed, 1.0), (opened, 0.5)]
        follow(self, pose, moves, rate_hz=RATE_HZ, max_speed=_RESET_SPEED)

    def close(self) -> None:
        """The motors keep their torque and their place."""
        self._topics.close()

    def _wake(self, arm: str) -> None:
        """A gripper that was blocked has switched itself off until its motor is rebooted."""
        grip = {"cmd_type": "single", "name": "gripper"}
        group = {"cmd_type": "group", "name": "arm"}
        profile = {"profile_type": "velocity", "profile_velocity": 0, "profile_acceleration": 0}
        calls: List[Any] = [
            ("reboot_motors", "Reboot", {**grip, "enable": True, "smart_reboot": False}),
            ("set_operating_modes", "OperatingModes", {**group, "mode": "position", **profile}),
            ("set_operating_modes", "OperatingModes", {**grip, "mode": "current_based_position", **profile}),
            ("torque_enable", "TorqueEnable", {**group, "enable": True}),
            ("torque_enable", "TorqueEnable", {**grip, "enable": True}),
        ]
        for service, kind, fields in calls:
            self._topics.call(f"/{arm}/{service}", f"interbotix_xs_msgs/{kind}", **fields)

    def _measured(self) -> Optional[np.ndarray]:
        """float64[14]; None = an arm is silent."""
        arms = []
        for latest in self._joints:
            message = latest.get()
            if message is None:
                return None
            arms.append(self._arm_state(latest.name, message))
        return np.concatenate(arms)

    def _arm_state(self, topic: str, message: Any) -> np.ndarray:
        measured = dict(zip(message.name, message.position))
        missing = [name for name in (*JOINTS, "left_finger") if name not in measured]
        if missing:
            raise ValueError(f"'{topic}' has no {', '.join(missing)}; it has {', '.join(measured)}")
        return np.array([*(measured[name] for name in JOINTS), self._gripper.measured(measured["left_finger"])])

    def _latest(self, topic: str, kinds: Sequence[str]) -> "Latest[object]":
        latest: Latest[Any] = Latest(topic)
        self._topics.subscribe(topic, kinds, lambda message: latest.put(message, _stamp_of(message)))
        return latest

    def _publisher(self, arm: str, topic: str, kind: str) -> Callable[..., None]:
        return self._topics.publisher(f"/{arm}/commands/{topic}", f"interbotix_xs_msgs/{kind}")
