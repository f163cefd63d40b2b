"""The robot side of openpi: talk to a policy server, play its action chunks, run a control loop."""

__version__ = "0.2.0"
