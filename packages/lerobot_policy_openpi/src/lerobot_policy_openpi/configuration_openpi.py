"""`config.json` of a policy folder: which server, and what of LeRobot's features is what of its contract."""

from dataclasses import dataclass, field

from lerobot.configs.policies import PreTrainedConfig
from lerobot.optim.optimizers import AdamWConfig


@PreTrainedConfig.register_subclass("openpi")
@dataclass
class OpenPIConfig(PreTrainedConfig):
    """
    Attributes:
        host, port: of the server; the host may be a URL (`ws://`, `wss://`). Without a port it is 8000, or 443 of `wss://`.
        n_action_steps: rows of a chunk that are played before the server is asked again; None = all.
        state_names, action_names: of LeRobot's vectors, in its order: the robot's features.
        names, cameras, units, convert, fixed: what names do not decide, as `Choices` of `openpi_client.robots`.
        image_size: [height, width] that pictures are resized to (with their aspect kept) where the contract does not
            say; None = sent as they are.
        jpeg_quality: 1 to 95: pictures travel as JPEG; None = as they are.
        max_age_s: a row is not played when its observation is older; None = twice as long as a chunk lasts.
        accept_warnings: start although the server finds the first observation suspicious.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    n_action_steps: int | None = None
    state_names: list[str] = field(default_factory=list)
    action_names: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    cameras: dict[str, str] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    convert: dict[str, list[float]] = field(default_factory=dict)
    fixed: dict[str, float] = field(default_factory=dict)
    image_size: list[int] | None = field(default_factory=lambda: [224, 224])
    jpeg_quality: int | None = None
    max_age_s: float | None = None
    accept_warnings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_action_steps is not None and self.n_action_steps < 1:
            raise ValueError(f"policy.n_action_steps is {self.n_action_steps}; expected at least 1, or nothing for all")
        if self.max_age_s is not None and not self.max_age_s > 0:
            raise ValueError(f"policy.max_age_s is {self.max_age_s}; expected more than 0, or nothing for two chunks")

    # What LeRobot asks of a config; nothing here is trained.

    def validate_features(self) -> None:
        """Raises ValueError unless the robot's features are known."""
        if not self.action_names:
            raise ValueError(
                "policy.action_names is empty, so the order of the robot's joints is not known; write the policy "
                "folder with `python -m lerobot_policy_openpi --host HOST --robot.type=... --output FOLDER`"
            )

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig()

    def get_scheduler_preset(self) -> object:
        return None

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None
