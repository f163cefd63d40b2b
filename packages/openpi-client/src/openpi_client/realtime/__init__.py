"""A control loop that never waits for the policy (docs/how-to/realtime.md). NumPy only.

with realtime.ProcessRequester("192.168.1.20", 8000) as policy:
    summary = realtime.ControlLoop(MyRobot(), policy).run(max_s=60)
"""

from openpi_client.realtime.actions import ActionSpec
from openpi_client.realtime.clock import MonotonicClock, VirtualClock
from openpi_client.realtime.limits import Limits
from openpi_client.realtime.loop import ControlLoop
from openpi_client.realtime.process import ProcessRequester
from openpi_client.realtime.requests import SimulatedLatency, ThreadRequester
from openpi_client.realtime.robot import Robot
from openpi_client.realtime.safety import Safety
from openpi_client.realtime.strategies import GuidedRTC, Receding, Synchronous, TemporalEnsembling, TrainedRTC

__all__ = [
    "ActionSpec",
    "ControlLoop",
    "GuidedRTC",
    "Limits",
    "MonotonicClock",
    "ProcessRequester",
    "Receding",
    "Robot",
    "Safety",
    "SimulatedLatency",
    "Synchronous",
    "TemporalEnsembling",
    "ThreadRequester",
    "TrainedRTC",
    "VirtualClock",
]
