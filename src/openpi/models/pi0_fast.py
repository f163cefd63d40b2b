"""The published import path of the pi0-FAST configuration. The model itself is not part of this build."""

from openpi.models.pi0_fast_config import Pi0FASTConfig

__all__ = ["Pi0FASTConfig"]
