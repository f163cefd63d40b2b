"""A robot, a policy and a server's contract for tests of the control loop, under a virtual clock."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from openpi_client import realtime
from openpi_client.base_policy import BasePolicy

NAMES = ("shoulder", "elbow")
RATE_HZ = 50.0
DT = 1 / RATE_HZ
HORIZON = 20
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def metadata(rtc: Sequence[str] = (), **actions: Any) -> dict:
    """What a server says: two joints, absolute, 50 Hz, chunks of 20."""
    told = {"key": "actions", "width": 2, "names": list(NAMES), "horizon": HORIZON, "kind": "absolute joint positions"}
    contract = {
        "robot": "two joints",
        "actions": {**told, **actions},
        "state": [{"key": "state", "width": 2, "names": list(NAMES)}],
        "cameras": [],
        "control_hz": RATE_HZ,
    }
    return {"contract": contract, **({"rtc": {"modes": list(rtc), "max_delay": 6}} if rtc else {})}


class Arm(realtime.Robot):
    """Is at once where it is told to be, and remembers what it was told."""

    def __init__(self, start: Sequence[float] = (0.0, 0.0)) -> None:
        self.position = np.array(start, np.float64)
        self.commands: list[np.ndarray] = []
        self.observed = 0
        self.freeze = False
        self.broken = False

    def observe(self) -> dict:
        if self.broken:
            raise RuntimeError("the camera's thread has died")
        self.observed += 1
        picture = PICTURE if self.freeze else PICTURE + np.uint8(self.observed % 200)
        return {"state": self.position.astype(np.float32), "image": picture, "prompt": "go"}

    def apply(self, action: np.ndarray) -> None:
        self.position = action.copy()
        self.commands.append(action.copy())


class Walk(BasePolicy):
    """From the observed position on, steps of 0.01 in each row; remembers what it was asked."""

    def __init__(self, step: float = 0.01, **result: Any) -> None:
        self.step, self.asked, self.result = step, [], result
        self.change: Callable[[int, dict], Any] = lambda number, result: result

    def infer(self, obs: dict) -> dict:
        self.asked.append(obs)
        rows = obs["state"] + self.step * np.arange(HORIZON)[:, None]
        return self.change(len(self.asked), {"actions": rows.astype(np.float32), **self.result})


class World:
    """A loop with its arm, policy and clock."""

    def __init__(
        self,
        delays: Sequence[float] = (4,),
        *,
        policy: BasePolicy | None = None,
        arm: Arm | None = None,
        told: dict | None = None,
        safety: realtime.Safety | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            delays: of the answers, in ticks.
        """
        self.clock = realtime.VirtualClock()
        self.arm, self.policy = arm or Arm(), policy or Walk()
        told = metadata() if told is None else told
        self.requester = realtime.SimulatedLatency(self.policy, self.clock, [DT * d for d in delays], told)
        self.warnings: list[str] = []
        self.loop = realtime.ControlLoop(
            self.arm,
            self.requester,
            safety=safety or realtime.Safety(blend_s=0),
            clock=self.clock,
            on_warning=self.warnings.append,
            **options,
        )

    def run(self, ticks: int = 100, **options: Any) -> dict:
        """One episode; its log is in `log`."""
        self.summary = self.loop.run(max_s=ticks * DT, **options)
        self.log = self.loop.last_log
        return self.summary

    def events(self, kind: str) -> list[dict]:
        return [event for event in self.log.events if event["kind"] == kind]

    @property
    def kinds(self) -> str:
        """One letter per tick: n(one), h(old), b(lend), r(ow)."""
        return "".join("nhbr"[kind] for kind in self.log.ticks["kind"])
