"""A desk without physics: two subtasks of a sequence take ten steps each, the third is never done."""

from typing import Any

import numpy as np
import told


class PlayTable:
    def reset(self, robot_obs: Any = None, scene_obs: Any = None) -> dict[str, Any]:
        told.write("reset", robot_obs=robot_obs, scene_obs=scene_obs)
        self._count = 0
        return self.get_obs()

    def get_obs(self) -> dict[str, Any]:
        pictures = {"rgb_static": np.zeros((200, 200, 3), np.uint8), "rgb_gripper": np.zeros((84, 84, 3), np.uint8)}
        return {"rgb_obs": pictures, "depth_obs": {}, "robot_obs": np.arange(15.0), "scene_obs": np.zeros(24)}

    def get_info(self) -> dict[str, int]:
        return {"count": self._count}

    def step(self, action: np.ndarray) -> tuple[dict, int, bool, dict]:
        assert len(action) == 7 and action[6] in (-1, 1)
        told.write("step", action=action.tolist())
        self._count += 1
        return self.get_obs(), 0, False, self.get_info()

    def close(self) -> None:
        told.write("closed")


def get_env(dataset_path: str, obs_space: Any = None, show_gui: bool = True) -> PlayTable:
    told.write("made", dataset_path=dataset_path, show_gui=show_gui)
    return PlayTable()
