"""One call of a sampler in its parts."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Program:
    """What `sample` does for one batch: `send`, `run`, `fetch`. Apart, so that a measurement can tell them apart.

    Each may be called again, after those before it; not while another call of the same sampler is under way.

    Attributes:
        send: starts bringing the inputs to the device.
        run: starts the computation.
        fetch: waits, and gives what `sample` returns.
        wait: returns when the device is done with all of it.
    """

    send: Callable[[], None]
    run: Callable[[], None]
    fetch: Callable[[], np.ndarray]
    wait: Callable[[], None]

    def __call__(self) -> np.ndarray:
        self.send()
        self.run()
        return self.fetch()
