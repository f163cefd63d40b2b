"""gym-aloha's environments by name, without physics: joints are where they are told to be, for 25 steps."""

from typing import Any

import gymnasium
import numpy as np
import told


class Aloha(gymnasium.Env):
    action_space = gymnasium.spaces.Box(-1, 1, (14,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        pixels=gymnasium.spaces.Dict(top=gymnasium.spaces.Box(0, 255, (480, 640, 3), np.uint8)),
        agent_pos=gymnasium.spaces.Box(-1000, 1000, (14,), np.float64),
    )

    def __init__(self, obs_type: str) -> None:
        assert obs_type == "pixels_agent_pos"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        told.write("reset", seed=seed)
        self._joints, self._count = np.linspace(0, 0.13, 14), 0
        return self._observed(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        told.write("step", action=action.tolist())
        self._joints, self._count = action, self._count + 1
        return self._observed(), 4.0 * (self._count == 20), self._count == 25, False, {"is_success": False}

    def _observed(self) -> dict[str, Any]:
        picture = np.zeros((480, 640, 3), np.uint8)
        picture[..., 0] = 200
        return {"pixels": {"top": picture}, "agent_pos": self._joints}


for name in ("AlohaTransferCube", "AlohaInsertion"):
    gymnasium.register(f"gym_aloha/{name}-v0", Aloha, max_episode_steps=300, disable_env_checker=True)
