"""Uses the published `positronic` against a server: `python upstream_positronic.py PORT CHECKPOINT`.

Run by the interpreter of an environment that holds the published package and nothing of this repository: version 0.2,
whose remote policy is what `--policy=.remote` is, or 0.3 or 0.4, whose session client is asked directly. Prints what
happened as JSON; `tests/client/test_client_upstream.py` looks at it.
"""

import json
import sys
from importlib.metadata import version

import numpy as np

IMAGE = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
OBSERVATION = {
    "robot_state.ee_pose": np.array([0.4, 0.1, 0.3, 0.0, 1.0, 0.0, 0.0]),
    "robot_state.q": np.zeros(7),
    "grip": 0.5,
    "image.wrist": IMAGE,
    "image.exterior": IMAGE,
    "task": "stack the cubes",
}


def remote_policy(port, checkpoint):
    """Version 0.2: how to ask, what the server said of itself, how to leave."""
    from positronic.policy import RemotePolicy

    policy = RemotePolicy("127.0.0.1", port, resize=640, model_id=checkpoint)
    policy.reset()
    meta = {key[len("server.") :]: value for key, value in policy.meta.items() if key.startswith("server.")}
    return policy.select_action, meta, policy.close


def session(port, checkpoint, query=""):
    """Versions 0.3 and 0.4, likewise."""
    from positronic.offboard.client import InferenceClient
    from positronic_wire.websocket import WebsocketClientWire
    from positronic_wire.wire import HostPortAddress

    address = HostPortAddress("127.0.0.1", port, f"/api/v1/session/{checkpoint}", query)
    client = InferenceClient(WebsocketClientWire(), address, connect_deadline=30)
    assert client.keepalive() is None  # the server stays
    opened = client.new_session()
    return opened.infer, opened.metadata, opened.close


def newer(port, checkpoint):
    """Steps in sessions of protocols 2 and 3, and with another horizon; images as JPEG."""
    from positronic_model_server.serialization import encode_jpeg

    observation = {**OBSERVATION, "image.wrist": encode_jpeg(IMAGE, quality=90)}
    counts = {}
    for query in ("protocol_version=2", "protocol_version=3", "codec.horizon_sec=0.2"):
        ask, _, leave = session(port, checkpoint, query)
        counts[query] = len(ask(observation))
        leave()
    return counts


def pose(command) -> list:
    """Position and rotation matrix, row by row."""
    if isinstance(command, dict):
        assert command["type"] == "cartesian_pos"
        return command["pose"].tolist()
    return [*command.pose.translation.tolist(), *command.pose.rotation.as_rotation_matrix.ravel().tolist()]


def refusal(call) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def main(port: int, checkpoint: str) -> None:
    connect = remote_policy if version("positronic").startswith("0.2.") else session
    ask, meta, leave = connect(port, checkpoint)
    steps = ask(OBSERVATION)
    report = {
        "meta": meta,
        "pose": pose(steps[0]["robot_command"]),
        "grips": [step["target_grip"] for step in steps],
        "timestamps": [step["timestamp"] for step in steps],
        "lacking": refusal(lambda: ask({key: value for key, value in OBSERVATION.items() if key != "grip"})),
        "again": len(ask(OBSERVATION)),
        "unknown": refusal(lambda: connect(port, "777")),
    }
    leave()
    if connect is session:
        report["newer"] = newer(port, checkpoint)
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
