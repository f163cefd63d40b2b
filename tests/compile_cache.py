"""What was compiled for one test of a module serves the others: models of the same shapes compile once."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Keeps compiled programs in `folder`, and compiles without much optimising: they run for a few steps."""
    options = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))  # or `openpi serve` chooses one
        _configure(options)
        try:
            yield
        finally:
            _configure(before)


def _configure(options: dict) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
