"""The policy: LeRobot's batches to a server's observations, and its chunks to LeRobot's actions."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE
from torch import Tensor

from lerobot_policy_openpi.configuration_openpi import OpenPIConfig
from openpi_client import connection, image_tools
from openpi_client.freshness import chunk_s, now_s
from openpi_client.realtime.actions import ActionSpec
from openpi_client.realtime.limits import Limiter, Limits
from openpi_client.realtime.requests import OTHER_SERVER, is_other_server
from openpi_client.realtime.worker import camera_sizes
from openpi_client.robots.lerobot_features import Choices, FeatureMap
from openpi_client.websocket_client_policy import WebsocketClientPolicy

logger = logging.getLogger(__name__)


class OpenPIPolicy(PreTrainedPolicy):
    """Asks an openpi server. It has no weights, and is not trained here.

    The rows of a chunk are played one by one; then the server is asked, and waited for. With LeRobot's real-time
    chunking, the rows that are still to be played go along, and the server's model goes on from them.
    """

    config_class = OpenPIConfig
    name = "openpi"

    def __init__(self, config: OpenPIConfig, dataset_stats: object = None, **_: object) -> None:
        """Blocks until the server is there and ready.

        Raises:
            ValueError: the features of the robot do not fit the server's contract.
        """
        super().__init__(config, dataset_stats)
        config.validate_features()
        self.config = config
        # LeRobot finds a policy's device by its parameters.
        self.register_buffer("_device", torch.zeros(1), persistent=False)
        key = connection.api_key_of()  # no field: it would be written to config.json
        port = connection.usual_port(config.host, config.port)
        self._client = WebsocketClientPolicy(config.host, port, key, jpeg_quality=config.jpeg_quality)
        self._metadata = metadata = self._client.get_server_metadata()
        self._robot_side = RobotSide(config, metadata)
        self._max_age_s = config.max_age_s or 2 * (chunk_s(metadata) or 1.0)
        self._has_started = False
        self._told: set[str] = set()
        self.reset()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: object
    ) -> Self:
        """The policy of a folder that `python -m lerobot_policy_openpi` wrote: there are no weights to load."""
        config = config or PreTrainedConfig.from_pretrained(pretrained_name_or_path)
        return cls(config).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        self.config._save_pretrained(save_directory)

    def reset(self) -> None:
        self._rows: deque[np.ndarray] = deque()
        self._last: list[np.ndarray] = []
        self._observed_s = 0.0

    @torch.no_grad()
    def select_action(self, batch: Mapping[str, object], **_: object) -> Tensor:
        """float32[b, width], in LeRobot's order and the robot's units: the next row of the chunk that is played.

        Raises:
            ValueError: the answer is of no use, or the observation.
            RuntimeError: the server finds the first observation suspicious, or failed.
            TimeoutError, ConnectionError: it does not answer.
        """
        if not self._rows or self._is_stale():
            self._observed_s = now_s()
            rows = self._chunks(batch, {})[:, : self.config.n_action_steps]
            self._rows = deque(np.moveaxis(rows, 1, 0))
        before = self._last or self._robot_side.poses(batch)
        if self._is_stale():
            return self._held(before)
        limited = self._robot_side.limited(self._rows.popleft(), before)
        self._last = [row for row, _ in limited]
        for _, problem in limited:
            self._tell(problem, "clamped")
        return torch.from_numpy(self._robot_side.to_lerobot(np.stack(self._last)))

    def _is_stale(self) -> bool:
        return now_s() - self._observed_s > self._max_age_s

    def _held(self, before: Sequence[np.ndarray | None]) -> Tensor:
        """Where each robot is: the answer came too late to be played, and the next call asks anew."""
        self._rows.clear()
        text = f"an answer came later than {self._max_age_s:.3g} s after its observation (max_age_s) and is not played"
        if any(row is None for row in before):
            raise TimeoutError(f"{text}; the robot does not measure what it is commanded, so it cannot be held")
        self._tell(f"{text}: the robot holds", "stale")
        held = [self._robot_side.spec.hold_row(row) for row in before if row is not None]
        return torch.from_numpy(self._robot_side.to_lerobot(np.stack(held)))

    def supports_rtc(self) -> bool:
        """Whether the server can go on from the rows that are still to be played."""
        return self._robot_side.continues

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: Mapping[str, object],
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
        **_: object,
    ) -> Tensor:
        """float32[b, horizon, width], in LeRobot's order and the robot's units.

        Args:
            inference_delay: rows that will have been played when this returns.
            prev_chunk_left_over: float[n, width], those that are still to be played.
            execution_horizon: rows from one call to the next.
        Raises:
            ValueError, RuntimeError, TimeoutError, ConnectionError: as `select_action`.
        """
        keys = self._continuation(prev_chunk_left_over, inference_delay, execution_horizon)
        rows = self._chunks(batch, keys)
        return torch.from_numpy(self._robot_side.to_lerobot(self._robot_side.within_range(rows)))

    def forward(self, batch: Mapping[str, object], **_: object) -> object:
        raise NotImplementedError("the policy 'openpi' is trained by `openpi train`, not by LeRobot")

    def get_optim_params(self) -> dict[str, object]:
        raise NotImplementedError("the policy 'openpi' is trained by `openpi train`, not by LeRobot")

    def _chunks(self, batch: Mapping[str, object], keys: Mapping[str, object]) -> np.ndarray:
        """float64[b, horizon, width], as the server answers them."""
        observations = [{**observation, **keys} for observation in self._robot_side.observations(batch)]
        if len(observations) == 1:
            results = [self._client.infer(observations[0])]
        else:
            results = self._client.infer_batch(observations)
        if is_other_server(self._metadata, self._client.get_server_metadata()):
            raise RuntimeError(OTHER_SERVER)
        for result in results:
            self._check(result)
        self._has_started = True
        return np.stack([np.asarray(result["actions"], np.float64) for result in results])

    def _check(self, result: Mapping[str, object]) -> None:
        if "error" in result:
            raise RuntimeError(f"the server refused an observation: {result['error']}")
        problem = self._robot_side.spec.problem(result.get("actions"), self._robot_side.spec.horizon)
        if problem:
            raise ValueError(problem)
        warnings = [str(text) for text in result.get("warnings", ())]
        for text in warnings:
            self._tell(text, text.partition(":")[0])
        if warnings and not self._has_started and not self.config.accept_warnings:
            raise RuntimeError(
                f"the server finds the observation suspicious, so the robot does not start: {'; '.join(warnings)}. If "
                "this is right, start with --policy.accept_warnings=true"
            )

    def _continuation(self, left: Tensor | None, delay: int | None, horizon: int | None) -> dict[str, object]:
        """What the server is told of the rows that are still to be played."""
        if left is None or left.numel() == 0 or not self._robot_side.continues:
            return {}
        rows = self._robot_side.from_lerobot(left.reshape(-1, left.shape[-1]).double().cpu().numpy())
        rows = rows[: self._robot_side.spec.horizon]
        keys = {"prev_action_chunk": rows, "inference_delay": min(int(delay or 0), len(rows))}
        return keys if horizon is None else {**keys, "execution_horizon": int(horizon)}

    def _tell(self, text: str, subject: str) -> None:
        """Logs it, once."""
        if text and subject not in self._told:
            self._told.add(subject)
            logger.warning("%s", text)


class RobotSide:
    """Between LeRobot's vectors and those of the server's contract.

    Attributes:
        spec: what an action of the server is.
        continues: whether the server can go on from a chunk.
    """

    def __init__(self, config: OpenPIConfig, metadata: Mapping[str, object]) -> None:
        self._state_names, self._action_names = list(config.state_names), list(config.action_names)
        pictures = {key.removeprefix(f"{OBS_IMAGES}."): key for key in config.image_features}
        self._pictures = pictures
        choices = Choices(
            config.names,
            config.cameras,
            config.units,
            {name: (float(scale), float(offset)) for name, (scale, offset) in config.convert.items()},
            config.fixed,
        )
        measured = {**dict.fromkeys(self._state_names, float), **dict.fromkeys(pictures, (0, 0, 3))}
        self._map = FeatureMap(measured, dict.fromkeys(self._action_names, float), metadata, choices)
        self.spec = ActionSpec.from_metadata(metadata, width=None, hold=self._map.hold)
        limits = Limits.from_metadata(metadata)
        self._limiter = Limiter(limits, self.spec)
        self._range = Limiter(Limits(limits.low, limits.high), self.spec)
        self._sizes, self._image_size = camera_sizes(metadata), config.image_size
        rtc = metadata.get("rtc")
        self.continues = bool(rtc.get("modes")) if isinstance(rtc, dict) else False

    def observations(self, batch: Mapping[str, object]) -> list[dict[str, object]]:
        """One for each robot of the batch."""
        state = batch[OBS_STATE].double().cpu().numpy() if self._state_names else np.zeros((self._size(batch), 0))
        if state.shape[1] != len(self._state_names):
            raise ValueError(
                f"'{OBS_STATE}' has {state.shape[1]} values; the policy folder was written for "
                f"{len(self._state_names)}: {', '.join(self._state_names)}. Write it anew for this robot"
            )
        return [self._observation(batch, row, values) for row, values in enumerate(state)]

    def _observation(self, batch: Mapping[str, object], row: int, values: np.ndarray) -> dict[str, object]:
        raw: dict[str, Any] = dict(zip(self._state_names, values.tolist(), strict=True))
        for key, name in self._map.cameras.items():
            raw[name] = self._resized(key, picture(batch[self._pictures[name]][row]))
        return self._map.observation(raw, _prompt(batch.get("task"), row))

    def _resized(self, key: str, image: np.ndarray) -> np.ndarray:
        size = self._sizes.get(key) or self._image_size
        return image_tools.resize_with_pad(image, *size) if size else image

    def _size(self, batch: Mapping[str, object]) -> int:
        return next(len(batch[key]) for key in self._pictures.values())

    def poses(self, batch: Mapping[str, object]) -> list[np.ndarray | None]:
        """Where each robot is, as a command, where that is measured."""
        if not self._state_names:
            return [None] * self._size(batch)
        state = batch[OBS_STATE].double().cpu().numpy()
        return [self._map.pose(dict(zip(self._state_names, values.tolist(), strict=True))) for values in state]

    def limited(self, rows: np.ndarray, last: Sequence[np.ndarray | None]) -> list[tuple[np.ndarray, str]]:
        """Each row within the limits of the contract, from the command before; and what was wrong with it."""
        return [self._limiter.within(row, before, is_seam=False) for row, before in zip(rows, last, strict=True)]

    def within_range(self, chunks: np.ndarray) -> np.ndarray:
        return np.stack([[self._range.within(row, None, is_seam=False)[0] for row in chunk] for chunk in chunks])

    def to_lerobot(self, rows: np.ndarray) -> np.ndarray:
        """[..., width of the policy] -> float32[..., width of the robot]."""
        flat = [self._map.action(row) for row in rows.reshape(-1, self.spec.width)]
        values = np.array([[action[name] for name in self._action_names] for action in flat], np.float32)
        return values.reshape(*rows.shape[:-1], len(self._action_names))

    def from_lerobot(self, rows: np.ndarray) -> np.ndarray:
        """[n, width of the robot] -> float32[n, width of the policy]."""
        actions = [dict(zip(self._action_names, row, strict=True)) for row in rows.tolist()]
        return np.stack([self._map.actions.read(action) for action in actions]).astype(np.float32)


def picture(image: Tensor) -> np.ndarray:
    """uint8[h, w, 3] of LeRobot's float[3, h, w] in [0, 1], which it made of such bytes."""
    values = image.detach().cpu()
    if values.is_floating_point():
        values = (255 * values).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(values.permute(1, 2, 0).numpy())


def _prompt(task: object, row: int) -> str | None:
    """The task of one robot; None where there is none, which leaves it to the server."""
    text = task[row] if isinstance(task, (list, tuple)) else task
    return text or None
