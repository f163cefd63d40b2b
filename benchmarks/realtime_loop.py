"""Ticks that are missed, and jumps between chunks, of control loops against one real server.

Usage: python benchmarks/realtime_loop.py [--seconds 60] [--hz 50] [--cameras 3] [--infer-ms 200] [--jitter-ms 50]
           [--loops process,thread,lerobot,upstream] [--restart] [--priority] [--json FILE]

The server is a process of its own, with real sockets; its "model" sleeps. What it answers are samples of the toy of
spec/realtime.md: smooth random curves (RBF, length 6 rows, chunks of 50). With a prefix it answers what an ideal model
trained for it would: the exact conditional given the rows that will have been played. Loops:

    process    openpi_client.realtime, ProcessRequester, TrainedRTC
    thread     the same, with packing and resizing in a thread of the loop's process
    naive      openpi_client.realtime, ProcessRequester, Receding: changes to the new chunk when it comes
    lerobot    as LeRobot's asynchronous rollout works: a thread observes, packs and asks; the merge trusts the longest
               latency that was measured; plain sleeps
    upstream   as the published client's documentation shows: Runtime(max_hz), ActionChunkBroker, resize in the loop

A tick is missed when its period passes without a new row. `--restart` kills the server in the middle and starts it. On
a machine that does other work: `chrt -f 1 python benchmarks/realtime_loop.py --priority`, with the peers last.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from openpi_client import image_tools, realtime
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.base_policy import BasePolicy
from openpi_client.runtime.agents.policy_agent import PolicyAgent
from openpi_client.runtime.environment import Environment
from openpi_client.runtime.runtime import Runtime
from openpi_client.websocket_client_policy import WebsocketClientPolicy

HORIZON, WIDTH, LENGTH = 50, 14, 6.0
NAMES = [f"joint {i}" for i in range(WIDTH)]


class ToyPolicy(BasePolicy):
    """Sleeps, and answers with a smooth curve; one that goes on from the prefix, if there is one."""

    def __init__(self, hz: float, infer_ms: float, jitter_ms: float) -> None:
        self._infer_ms, self._jitter_ms = infer_ms, jitter_ms
        self._rng = np.random.default_rng(0)
        steps = np.arange(HORIZON)
        self._cov = np.exp(-0.5 * ((steps[:, None] - steps) / LENGTH) ** 2) + 1e-6 * np.eye(HORIZON)
        contract = {
            "robot": "toy",
            "actions": {"key": "actions", "names": NAMES, "horizon": HORIZON, "kind": "absolute joint positions"},
            "state": [{"key": "state", "names": NAMES}],
            "cameras": [],
            "control_hz": hz,
        }
        self.metadata = {"contract": contract, "rtc": {"modes": ["trained"], "max_delay": 24, "horizon": HORIZON}}

    def infer(self, obs: dict) -> dict:
        time.sleep(1e-3 * (self._infer_ms + self._jitter_ms * self._rng.uniform(-1, 1)))
        known = np.asarray(obs.get("prev_action_chunk", np.zeros((0, WIDTH))))[: obs.get("inference_delay", 0)]
        return {"actions": self._sample(known).astype(np.float32)}

    def _sample(self, known: np.ndarray) -> np.ndarray:
        d = len(known)
        gain = self._cov[d:, :d] @ np.linalg.inv(self._cov[:d, :d])
        rest = self._cov[d:, d:] - gain @ self._cov[:d, d:]
        root = np.linalg.cholesky(rest + 1e-6 * np.eye(HORIZON - d))
        return np.concatenate([known, gain @ known + root @ self._rng.standard_normal((HORIZON - d, WIDTH))])


class Server:
    """The policy's server, as a process."""

    def __init__(self, args: argparse.Namespace, port: int = 0) -> None:
        command = [sys.executable, __file__, "--serve", str(port), "--hz", str(args.hz)]
        command += ["--infer-ms", str(args.infer_ms), "--jitter-ms", str(args.jitter_ms)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Arm(realtime.Robot, Environment):
    """Cameras of 640x480, and a clock on every command."""

    def __init__(self, cameras: int, seconds: float) -> None:
        rng = np.random.default_rng(1)
        self._pictures = [rng.integers(0, 256, (480, 640, 3), np.uint8) for _ in range(cameras + 3)]
        self._cameras, self._seconds, self._count = cameras, seconds, 0
        self._start_s = time.perf_counter()
        self.position = np.zeros(WIDTH)
        self.times_s: list[float] = []
        self.commands: list[np.ndarray] = []

    def observe(self) -> dict:
        self._count += 1
        images = {f"cam_{i}": self._pictures[(i + self._count) % len(self._pictures)] for i in range(self._cameras)}
        return {**images, "state": self.position.astype(np.float32), "prompt": "fold the towel"}

    def apply(self, action: np.ndarray) -> None:
        self.times_s.append(time.perf_counter())
        self.commands.append(np.array(action))
        self.position = self.commands[-1]

    # As the published runtime wants it.

    def reset(self) -> None:
        self._start_s = time.perf_counter()

    def is_episode_complete(self) -> bool:
        return time.perf_counter() - self._start_s > self._seconds

    def get_observation(self) -> dict:
        obs = self.observe()
        return {k: image_tools.resize_with_pad(v, 224, 224) if k.startswith("cam") else v for k, v in obs.items()}

    def apply_action(self, action: dict) -> None:
        self.apply(action["actions"])


def run_realtime(args: argparse.Namespace, server: Server, name: str) -> dict:
    arm = Arm(args.cameras, args.seconds)
    if name == "thread":
        policy = realtime.ThreadRequester(Resizing(WebsocketClientPolicy("127.0.0.1", server.port, resend=False)))
    else:
        policy = realtime.ProcessRequester("127.0.0.1", server.port)
    strategy = realtime.Receding() if name == "naive" else realtime.TrainedRTC()
    folder = None if args.log is None else args.log / name
    loop = realtime.ControlLoop(
        arm,
        policy,
        strategy=strategy,
        safety=realtime.Safety(blend_s=1.0),
        log_folder=folder,
        on_warning=print,
        priority=args.priority,
    )
    restart = threading.Timer(args.seconds / 2, restarted, (args, server)) if args.restart else None
    if restart is not None:
        restart.start()
    summary = loop.run(max_s=args.seconds)
    policy.close()
    assert loop.last_log is not None
    rows = loop.last_log.ticks
    played = rows["kind"] == 3
    first = int(np.argmax(played))
    without_row, skipped = int((~played[first:]).sum()), int(rows["skipped"][first:].sum())
    late_ms = 1e3 * rows["late_s"][first:]
    facts = {"oldest_row_s": summary["oldest_row_s"], "end": summary["end"], "latency_ms": summary["latency_ms"]}
    if restart is not None:
        restart.join()
        facts.update(holds=summary["holds"], stops=summary["stops"], stale=summary["stale"], failed=summary["failed"])
    return {
        "ticks": len(rows) - first + skipped,
        "missed": without_row + skipped,
        "without_row": without_row,
        "skipped": skipped,
        "tick_error_ms": late_ms,
        "jump": summary["seams"]["jump_over_step"],
        **facts,
    }


def restarted(args: argparse.Namespace, server: Server) -> None:
    server.kill()
    time.sleep(1.0)
    server.process = Server(args, server.port).process


class Resizing(BasePolicy):
    """Resizes in the thread that asks."""

    def __init__(self, policy: WebsocketClientPolicy) -> None:
        self._policy = policy

    def infer(self, obs: dict) -> dict:
        images = {k: image_tools.resize_with_pad(v, 224, 224) for k, v in obs.items() if k.startswith("cam")}
        return self._policy.infer({**obs, **images})

    def get_server_metadata(self) -> dict:
        return self._policy.get_server_metadata()


def run_upstream(args: argparse.Namespace, server: Server) -> dict:
    arm = Arm(args.cameras, args.seconds)
    broker = ActionChunkBroker(WebsocketClientPolicy("127.0.0.1", server.port), action_horizon=25)
    Runtime(arm, PolicyAgent(broker), [], max_hz=args.hz).run()
    return from_times(args, arm, seams=range(25, len(arm.times_s), 25))


def run_lerobot(args: argparse.Namespace, server: Server) -> dict:
    """A queue, a thread that fills it, and `sleep(dt - elapsed)`."""
    arm, policy, dt = Arm(args.cameras, args.seconds), WebsocketClientPolicy("127.0.0.1", server.port), 1 / args.hz
    queue: list[np.ndarray] = []
    seams: list[int] = []
    lock, done, latencies = threading.Lock(), threading.Event(), [0.0]

    def ask() -> None:
        while not done.is_set():
            if len(queue) > 30:
                time.sleep(0.01)
                continue
            start_s = time.perf_counter()
            rows = policy.infer(arm.get_observation())["actions"]
            latencies.append(time.perf_counter() - start_s)
            with lock:
                queue[:] = list(rows[math.ceil(max(latencies) / dt) :])
                seams.append(len(arm.times_s))

    thread = threading.Thread(target=ask, daemon=True)  # a run that is ended early does not wait for its answer
    thread.start()
    end_s = time.perf_counter() + args.seconds
    while time.perf_counter() < end_s:
        start_s = time.perf_counter()
        with lock:
            action = queue.pop(0) if queue else None
        if action is not None:
            arm.apply(action)
        time.sleep(max(0.0, dt - (time.perf_counter() - start_s)))
    done.set()
    thread.join()
    policy.close()
    return from_times(args, arm, seams=seams)


def from_times(args: argparse.Namespace, arm: Arm, seams: object) -> dict:
    """Of a loop that keeps no log: by when its commands came."""
    times_s, commands = np.array(arm.times_s), np.array(arm.commands)
    expected = round((times_s[-1] - times_s[0]) * args.hz) + 1
    at = np.array([i for i in seams if 0 < i < len(commands)], np.int64)  # type: ignore[union-attr]
    steps = np.abs(np.diff(commands, axis=0)).max(axis=1)
    inner = np.delete(steps, at - 1)
    return {
        "ticks": expected,
        "missed": expected - len(times_s),
        "tick_error_ms": 1e3 * np.abs(np.diff(times_s) - 1 / args.hz),
        "jump": float(steps[at - 1].mean() / inner.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--hz", type=float, default=50)
    parser.add_argument("--cameras", type=int, default=3)
    parser.add_argument("--infer-ms", type=float, default=200)
    parser.add_argument("--jitter-ms", type=float, default=50)
    parser.add_argument("--loops", default="process,thread,naive,lerobot,upstream")
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--priority", action="store_true", help="the loop's process before all others (SCHED_FIFO)")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=int)
    args = parser.parse_args()
    if args.serve is not None:
        return serve(args)
    server, results = Server(args), {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(f"load {os.getloadavg()[0]:.1f}; {args.hz:g} Hz, {args.cameras} cameras, {args.infer_ms:g} ms", flush=True)
    try:
        for name in args.loops.split(","):
            special = {"lerobot": run_lerobot, "upstream": run_upstream}
            if name in special and args.priority:
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
            result = special[name](args, server) if name in special else run_realtime(args, server, name)
            result["tick_error_ms"] = dict(
                zip(("p50", "p99", "max"), np.percentile(result["tick_error_ms"], (50, 99, 100)).tolist(), strict=True)
            )
            results[name] = result
            print(name, json.dumps(result), flush=True)
    finally:
        server.kill()
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


def serve(args: argparse.Namespace) -> None:
    from openpi.serving.server import PolicyServer

    policy = ToyPolicy(args.hz, args.infer_ms, args.jitter_ms)
    PolicyServer(lambda: policy, port=args.serve, on_listening=lambda port: print(port, flush=True)).run()


if __name__ == "__main__":
    main()
