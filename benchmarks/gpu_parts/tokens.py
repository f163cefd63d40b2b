"""pi0-FAST, which writes its actions token by token."""

from typing import Any

import numpy as np

from gpu_parts import models
from gpu_parts.records import Records, figure, times_ms
from gpu_parts.sizes import Size, batch


def tokens(part: str, *, backend: str, size: Size, records: Records) -> None:
    """Time of a token: what many take more than few."""
    config = size.fast
    if backend == "jax":
        sampler = models.jax_sampler(config)
    else:
        sampler = models.pytorch_sampler(config, compile_mode=None, uses_graphs=True)
    rows = batch(config, 1, cameras=len(config.image_keys), prompt_len=config.max_token_len // 2)
    inputs: dict[str, Any] = {key: value for key, value in rows.items() if not key.endswith("loss_mask")}
    few, many = size.tokens
    times, written = {}, {}
    for count in size.tokens:
        found = sampler.sample(inputs, None, max_decoding_steps=count)
        written[count] = int(np.count_nonzero(found))
        times[count] = times_ms(
            lambda count=count: sampler.sample(inputs, None, max_decoding_steps=count),
            seconds=size.seconds / 3,
            at_most=50,
        )
    base = float(np.median(times[few]))
    each = [(ms - base) / (many - few) for ms in times[many]]
    figures = {"a token": figure(each, "ms"), f"{many} tokens": figure(times[many], "ms")}
    # Random weights may end a text: then fewer passes were made than the difference is divided by.
    note = "" if written[many] == many else f"only {written[many]} of {many} tokens are not 0"
    records.write(part, "pi0-FAST, LIBERO", figures=figures, note=note)
