"""The programs of a sampler: which part of its padded inputs it runs, and one call in its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from openpi.models import compact
from openpi.models.compact import Extent
from openpi.models.model_config import BaseModelConfig
from openpi.shared.tree import Tree

Options: TypeAlias = tuple[tuple[str, Any], ...]
"""Of a sampler's call, in order of their names: what a program is compiled for."""


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


def check_finite(actions: np.ndarray) -> None:
    """Of what a warm-up gave, before any robot asks.

    Raises:
        ValueError: NaN or infinity.
    """
    if actions.dtype.kind == "f" and not np.isfinite(actions).all():
        raise ValueError(
            "the model gives NaN or infinity for an observation made up to warm it up: its weights or statistics are "
            "damaged, as by training on NaN. Serve an earlier checkpoint, or bring this one here again"
        )


class Extents:
    """What a sampler has programs for, by batch size and options, so that nothing is compiled while a robot waits.

    Args:
        config: of the model; one without `skip_unused` runs everything.
    """

    def __init__(self, config: BaseModelConfig) -> None:
        self._config = config
        self._ready: dict[Any, set[Extent]] = {}

    def choose(self, inputs: Mapping[str, object], options: Options) -> Extent:
        """The least that holds all these inputs use, of what is ready; else everything. A robot must not wait for the
        compiler because its prompt has grown by a token.
        """
        used, whole = self.used(inputs, options), compact.whole_extent(inputs)
        enough = [extent for extent in (*self._ready_for(inputs, options), whole) if extent.holds(used)]
        return min(enough, key=lambda extent: (len(extent.cameras), extent.prompt_len or 0))

    def make_ready(self, inputs: Mapping[str, object], options: Options) -> list[Extent]:
        """What to warm up for inputs like these: anything that they could hold, so that no later call has to compile,
        and what these use and prompts a little longer, which is less work. They count as ready from now on.
        """
        whole = compact.whole_extent(inputs)
        extents = list(dict.fromkeys((whole, compact.longer(self.used(inputs, options), whole))))
        self._ready_for(inputs, options).update(extents)
        return extents

    def used(self, inputs: Tree, options: Options) -> Extent:
        """The least that holds all these inputs use."""
        if not self._config.skip_unused:
            return compact.whole_extent(inputs)
        exact_slots = dict(options).get("exact_slots", False)
        return compact.used_extent(inputs, reads_masked=compact.reads_masked(self._config, exact_slots=exact_slots))

    def _ready_for(self, inputs: Tree, options: Options) -> set[Extent]:
        return self._ready.setdefault((len(inputs["state"]), options), set())
