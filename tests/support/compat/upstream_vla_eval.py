"""An episode with a model server of vla-eval, by its own connection: `python upstream_vla_eval.py URL ASK.npz OUT.npz`.

Run in an environment with vla-eval 0.8.0.
"""

import sys

import anyio
import numpy as np
from vla_eval.connection import Connection

NUM_ACTIONS = 7


async def play(url: str, asked: str, out: str) -> None:
    given = np.load(asked)
    observation = {
        "images": {"agentview": given["image"], "wrist": given["wrist_image"]},
        "states": given["state"],
        "task_description": str(given["prompt"]),
    }
    async with Connection(url, timeout=300) as connection:
        info = connection.server_info
        await connection.start_episode({"task": {"name": "pick"}})
        actions = [(await connection.act(observation))["actions"] for _ in range(NUM_ACTIONS)]
        await connection.end_episode({"success": False})
    np.savez(out, actions=np.stack(actions), server=info["model_server"], wants=sorted(info["observation_params"]))


if __name__ == "__main__":
    anyio.run(play, *sys.argv[1:])
