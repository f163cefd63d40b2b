"""Uses the published `openpi-client` against a server of an exported ALOHA model: `python upstream_exported.py PORT`.

Run by the interpreter of an environment that holds the published package and nothing of this repository. Prints the
answer as JSON; `tests/client/test_client_upstream.py` looks at it.
"""

import json
import sys

import numpy as np

from openpi_client import websocket_client_policy


def main(port: int) -> None:
    policy = websocket_client_policy.WebsocketClientPolicy(host="127.0.0.1", port=port)
    cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    images = {name: np.zeros((3, 224, 224), np.uint8) for name in cameras}
    result = policy.infer({"state": np.ones(14), "images": images, "prompt": "fold the towel"})
    policy._ws.close()  # websockets 11 keeps the process alive until then
    print(json.dumps({"actions": result["actions"].tolist()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
