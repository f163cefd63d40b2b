"""The robot side: asks a policy server for action chunks and plays them. Needs `openpi-client` only."""

import sys

import numpy as np

from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

host, port = sys.argv[1], int(sys.argv[2])
broker = ActionChunkBroker(WebsocketClientPolicy(host, port), action_horizon=5)  # asks once per 5 steps

joints = np.zeros(4, np.float32)
for _ in range(20):
    observation = {
        "observation/front": np.full((120, 160, 3), 90, np.uint8),  # your camera: RGB
        "observation/state": joints,
        "prompt": "swing to the right",
    }
    joints = np.array(broker.infer(observation)["actions"], np.float32)  # your arm: move to these targets
print("joints after 20 steps:", np.round(joints, 2))
