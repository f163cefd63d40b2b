"""From the start of the process to the first chunk."""

import os
import time
from typing import Any

from gpu_parts import models
from gpu_parts.calls import observation_for, pipeline_of, policy_of
from gpu_parts.records import Records, figure
from gpu_parts.sizes import Size

STARTED = "ON_GPU_STARTED"


def since_start() -> dict[str, Any]:
    """Of this process, as its parent noted it; imports, weights, compilation and warm-up included."""
    return figure(time.time() - float(os.environ[STARTED]), "s")


def again(part: str, *, backend: str, size: Size, records: Records) -> None:
    """With what the parts before have compiled, as a server that is started again."""
    shape = size.shapes["published"]
    pipeline = pipeline_of(shape)
    if backend == "jax":
        sampler = models.jax_sampler(shape.model)
    else:
        compile_mode = "default" if size.compiles else None
        sampler = models.pytorch_sampler(shape.model, compile_mode=compile_mode, uses_graphs=True)
    policy, observation = policy_of(sampler, pipeline), observation_for(shape, pipeline)
    policy.warm_up(observation)
    policy.infer(observation)
    records.write(part, "published", figures={"first chunk after": since_start()})
