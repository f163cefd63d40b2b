"""What can be in charge of a robot: `--policy=.remote`, or a configuration of your own by `@module.name`."""

from __future__ import annotations

from typing import Any

import configuronic as cfn

from openpi_positronic.simulation.policies import RobotPolicy
from positronic import commands


@cfn.config()
def placeholder() -> RobotPolicy:
    """Stands where a policy must be named."""
    raise ValueError("no policy; name one with --policy=.remote (a server) or --policy=.scripted (demonstrations)")


@cfn.config(host="localhost", port=8000, resize=640, model_id=None, horizon_sec=None, codec=None, api_key=None)
def remote(
    host: str,
    port: int | None,
    resize: int | None,
    model_id: str | None,
    horizon_sec: float | None,
    codec: Any,
    api_key: str | None,
) -> RobotPolicy:
    """Behind an inference server, `openpi-server` or Positronic's."""
    from openpi_client.connection import api_key_of
    from openpi_client.positronic_client import PositronicClient

    return PositronicClient(
        str(host),
        port,
        resize=resize,
        model_id=None if model_id is None else str(model_id),
        horizon_sec=horizon_sec,
        codec=commands.codec(codec),
        api_key=api_key_of(None if api_key is None else str(api_key)),
    )


@cfn.config()
def scripted() -> RobotPolicy:
    """An expert that knows where the cubes are; to record demonstrations with."""
    from openpi_positronic.simulation.policies import ScriptedPolicy

    return ScriptedPolicy()
