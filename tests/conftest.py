"""Strictness that only tests switch on: run-time shape checks, no implicit dtype promotion surprises, fixed seeds."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENPI_DATA_HOME", str(Path(__file__).parent / ".cache"))

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of recorded reference data (see tests/golden/README.md)."""
    return GOLDEN
