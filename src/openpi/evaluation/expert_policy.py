"""A world's expert as a policy to be served: under the contract of the recipe whose keys and actions it speaks."""

from __future__ import annotations

import numpy as np

from openpi.envs.world import PRIVILEGED, Expert
from openpi.policies.contract import Contract
from openpi.policies.guards import ContractGuard, ObservationError
from openpi.policies.request import Request
from openpi_client.base_policy import BasePolicy, Observation


class ExpertPolicy(BasePolicy):
    """Checks what it is sent as a trained policy does, so that its success proves that keys and actions are right."""

    def __init__(self, expert: Expert, contract: Contract | None) -> None:
        """
        Args:
            contract: None = the recipe's robot has no spec; nothing is checked.
        """
        self.contract, self.metadata = contract, {"expert": True}
        self._expert = expert
        self._guard = None if contract is None else ContractGuard(contract)

    def infer(self, obs: Observation) -> dict[str, object]:
        """Raises ObservationError for what the contract refuses, ValueError for actions that it does not promise."""
        observation = Request.parse(obs).observation
        if PRIVILEGED not in observation:
            raise ObservationError(
                f"observation has no '{PRIVILEGED}': this is an expert, which needs what only a simulator knows; ask "
                "it by `openpi evaluate WORLD --policy expert`"
            )
        sent = {key: value for key, value in observation.items() if key != PRIVILEGED}
        if self._guard is not None:
            self._guard(sent)
        rows = np.asarray(self._expert.infer(observation)["actions"], np.float32)
        if rows.ndim != 2 or not len(rows) or not np.isfinite(rows).all():
            raise ValueError(f"the expert's actions have shape {rows.shape}; expected finite [horizon, action_dim]")
        if self.contract is not None:
            self.contract.check_actions(rows.shape[1], where="the expert's actions have")
            rows = rows[: self.contract.action_horizon]
        return {"actions": rows}
