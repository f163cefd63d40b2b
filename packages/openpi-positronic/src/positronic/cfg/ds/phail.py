"""The public recordings of Positronic."""

from __future__ import annotations

import configuronic as cfn

from positronic.cfg.ds import Recordings

_BUCKET = "s3://positronic-public/datasets"
PUBLIC = {"s3": {"endpoint_url": "https://storage.eu-north1.nebius.cloud", "anon": True}}


@cfn.config(name="phail")
def phail(name: str) -> Recordings:
    """Real recordings."""
    return Recordings(f"{_BUCKET}/{name}/", PUBLIC)


sim_stack_cubes = phail.override(name="sim-stack-cubes")
sim_pick_place = phail.override(name="sim-pick-place")
