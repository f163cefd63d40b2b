"""Which ALOHA tasks there are, without the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from openpi.envs.world import Task, World
from openpi_sim import extra

if TYPE_CHECKING:
    from openpi_sim.aloha.expert import AlohaExpert

TRANSFER, INSERTION = "aloha/transfer_cube", "aloha/insertion"
CONTROL_HZ = 50.0
_MAX_STEPS = 300  # as `gym_aloha` registers both

_TASKS = {
    # The recipe's default prompt, and the one that the published checkpoint knows.
    "transfer": Task(TRANSFER, "Transfer cube", _MAX_STEPS),
    "insertion": Task(INSERTION, "Insert the peg into the socket", _MAX_STEPS),
}


@dataclass(frozen=True)
class AlohaConfig:
    """`gym_aloha/AlohaTransferCube-v0` and `gym_aloha/AlohaInsertion-v0`.

    Attributes:
        task: which of the two.
        image_size: pixels, width and height of what a policy gets; the picture is 4:3, with black above and below.
        exact_images: draw 640 x 480 with shadows and scale that down, as the published program does. Without, pictures
            are drawn without shadows in the size that is needed, in a tenth of the time.
    """

    task: Literal["transfer", "insertion", "both"] = "transfer"
    image_size: int = 224
    exact_images: bool = False

    @property
    def recipe(self) -> str:
        return "pi0_aloha_sim"

    @property
    def control_hz(self) -> float:
        return CONTROL_HZ

    @property
    def execute_horizon(self) -> int:
        """Rows of a chunk that the published program plays."""
        return 10

    def tasks(self) -> tuple[Task, ...]:
        """See `WorldConfig`."""
        extra.check("gym_aloha", "aloha")
        return tuple(_TASKS.values()) if self.task == "both" else (_TASKS[self.task],)

    def open(self, *, privileged: bool = False) -> World:
        """See `WorldConfig`."""
        extra.check("gym_aloha", "aloha")
        from openpi_sim.aloha.world import AlohaWorld

        return AlohaWorld(image_size=self.image_size, exact_images=self.exact_images, privileged=privileged)

    def expert(self) -> AlohaExpert | None:
        """See `WorldConfig`. None for insertion, which nobody has written yet."""
        if self.task != "transfer":
            return None
        extra.check("gym_aloha", "aloha")
        from openpi_sim.aloha.expert import AlohaExpert

        return AlohaExpert()
