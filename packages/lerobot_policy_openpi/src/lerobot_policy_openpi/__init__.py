"""LeRobot's policy `openpi`: a client of a policy server. LeRobot imports this by the name of its distribution."""

from lerobot_policy_openpi.configuration_openpi import OpenPIConfig
from lerobot_policy_openpi.modeling_openpi import OpenPIPolicy
from lerobot_policy_openpi.processor_openpi import make_openpi_pre_post_processors

__all__ = ["OpenPIConfig", "OpenPIPolicy", "make_openpi_pre_post_processors"]
