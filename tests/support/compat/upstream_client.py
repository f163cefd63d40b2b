"""Uses the published `openpi-client` against a server: `python upstream_client.py PORT`.

Run by the interpreter of an environment that holds the published package and nothing of this repository. Prints
what happened as JSON; `tests/client/test_client_upstream.py` looks at it.
"""

import json
import sys

import numpy as np

from openpi_client import action_chunk_broker, image_tools, websocket_client_policy


def main(port: int) -> None:
    policy = websocket_client_policy.WebsocketClientPolicy(host="127.0.0.1", port=port)
    image = image_tools.resize_with_pad(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3), 224, 224)
    first = policy.infer({"images": {"cam_high": image}, "x": np.arange(4.0), "name": "first"})
    second = policy.infer({"x": image})
    broker = action_chunk_broker.ActionChunkBroker(policy, action_horizon=4)
    rows = [float(broker.infer({"x": float(i)})["actions"][0]) for i in range(5)]
    for name, observation in robots().items():
        assert policy.infer({**observation, "name": name})["name"] == name
    try:
        policy.infer({"fail": "deliberate failure"})
        failure = ""
    except RuntimeError as error:
        failure = str(error)
    report = {
        "metadata": policy.get_server_metadata(),
        "first": first["actions"].tolist(),
        "dtype": first["actions"].dtype.str,
        "name": first["name"],
        "timing": sorted(second["server_timing"]),
        "sum": float(second["actions"][0, 0]),
        "sent_sum": float(image.sum()),
        "rows": rows,
        "failure": failure,
    }
    print(json.dumps(report))


def robots() -> dict:
    """What the published examples send."""
    image = np.zeros((224, 224, 3), dtype=np.uint8)
    cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    return {
        "aloha": {
            "state": np.ones(14),
            "images": {camera: np.zeros((3, 224, 224), dtype=np.uint8) for camera in cameras},
            "prompt": "do something",
        },
        "droid": {
            "observation/exterior_image_1_left": image,
            "observation/wrist_image_left": image,
            "observation/joint_position": np.random.rand(7),
            "observation/gripper_position": np.random.rand(1),
            "prompt": "do something",
        },
        "libero": {
            "observation/state": np.random.rand(8),
            "observation/image": image,
            "observation/wrist_image": image,
            "prompt": "do something",
        },
    }


if __name__ == "__main__":
    main(int(sys.argv[1]))
