"""Strictness that only tests switch on: run-time shape checks, no implicit dtype promotion surprises, fixed seeds."""

import os
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENPI_DATA_HOME", str(Path(__file__).parent / ".cache"))

# Shapes written in signatures are checked while tests run, and only then.
jaxtyping.install_import_hook(
    [
        "openpi.models.gemma",
        "openpi.models.siglip",
        "openpi.models.lora",
        "openpi.models.pi0",
        "openpi.models.augment",
    ],
    "beartype.beartype",
)

# How long an example takes says nothing on a shared machine.
hypothesis.settings.register_profile("openpi", deadline=None)
hypothesis.settings.load_profile("openpi")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of recorded reference data (see tests/golden/README.md)."""
    return GOLDEN
