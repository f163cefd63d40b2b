"""An agent that asks a policy."""

from typing import Dict

from typing_extensions import override

from openpi_client import base_policy
from openpi_client.runtime import agent


class PolicyAgent(agent.Agent):
    """Every step is one call of the policy; wrap it in an `ActionChunkBroker` to play chunks."""

    def __init__(self, policy: base_policy.BasePolicy) -> None:
        self._policy = policy

    @override
    def get_action(self, observation: Dict) -> Dict:
        return self._policy.infer(observation)

    @override
    def reset(self) -> None:
        self._policy.reset()
