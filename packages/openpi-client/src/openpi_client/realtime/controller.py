"""What to command at each tick: pure decisions, without robot, clock or network.

home -> start -> blend -> play      start: asks where the policy would begin; commands nothing new
                  ^         |       blend: from the measured pose to there, slowly
        start <---+---------'       play: asks anew, and plays; holds when there is no row
             held for too long
"""

import enum
import math
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np

from openpi_client.base_policy import Observation
from openpi_client.realtime.actions import ActionSpec
from openpi_client.realtime.limits import Limiter, LimitExceeded, Limits
from openpi_client.realtime.plan import Plan, Row
from openpi_client.realtime.questions import Question, Questions
from openpi_client.realtime.requests import Answer
from openpi_client.realtime.safety import Safety
from openpi_client.realtime.start import BlendedStart
from openpi_client.realtime.strategies import Strategy, TrainedRTC

Record = Callable[..., None]


class EpisodeEnded(Exception):
    """The controller does not go on; the text says why."""


# Different ones of an episode that are told of, and of one answer that a refusal shows.
_MOST_WARNINGS, _SHOWN = 100, 10
# How far beyond what commands may be a robot may start, in widths of that; degrees instead of radians are farther.
_POSE_RANGES = 1.0
# For where to start, until it is said that nobody answers.
_PATIENCE_S = 5.0


class Phase(enum.Enum):
    HOME = "home"
    START = "start"
    BLEND = "blend"
    PLAY = "play"


class Command(NamedTuple):
    """What the robot is told at one tick.

    Attributes:
        values: float64[width]; None = nothing (the pose is not known yet, or the robot was stopped).
        kind: "row" of a chunk, "hold", "blend", or "none".
        row: which, if it is one.
        is_seam: whether it is the first of its chunk.
        jump: at a seam, largest change from the last command in the dimensions that are positions.
    """

    values: Optional[np.ndarray]
    kind: str
    row: Optional[Row] = None
    is_seam: bool = False
    jump: float = 0.0


class Controller:
    """Call once per tick, in this order: `take` the answer if there is one; `command`; `question` if `is_due`."""

    def __init__(
        self,
        spec: ActionSpec,
        strategy: Strategy,
        safety: Safety,
        *,
        rate_hz: float,
        limits: Optional[Limits] = None,
        max_delay: Optional[int] = None,
        recent_delays: Sequence[int] = (),
        record: Record = lambda kind, **fields: None,
        on_warning: Callable[[str], None] = lambda text: None,
        on_stop: Optional[Callable[[str], None]] = None,
    ) -> None:
        """
        Args:
            rate_hz: of the ticks; rows in between are interpolated when the policy has another rate.
            limits: None = no bounds.
            max_delay: rows, that the server's model was trained for.
            recent_delays: ticks, of answers in the episode before.
            record: called as record(kind, **fields) with all that happens.
            on_warning: called with each warning, once.
            on_stop: called with the reason when the robot has held for too long; from then on it gets no commands until
                a blended start. None = it goes on holding.
        """
        self.spec, self.strategy, self.safety, self.rate_hz = spec, strategy, safety, rate_hz
        self.rows_per_tick = safety.speed * (1.0 if spec.rate_hz is None else spec.rate_hz / rate_hz)
        self._record, self._on_warning, self._on_stop = record, on_warning, on_stop
        self._limiter = Limiter(limits or Limits(), spec, rows_per_tick=self.rows_per_tick, rate_hz=rate_hz)
        self.phase = Phase.START
        self._questions = Questions(strategy, rate_hz, self.rows_per_tick, max_delay, recent_delays)
        self.plan = Plan(spec)
        self._use_horizon(spec.horizon or 1)
        self._last: Optional[np.ndarray] = None  # command
        self._last_chunk = -1
        self._prompt: Optional[str] = None  # of the newest chunk
        self._played_at = -1  # tick of the last row
        self._has_played = False  # a row, since the start
        self._is_trusted = False  # a row was played, since the episode began
        self._is_stopped = False  # by `on_stop`, until the next start
        self._held = 0  # ticks since the last row
        self._tick = 0  # of the last command
        self._home: Optional[np.ndarray] = None
        self._blend: Optional[BlendedStart] = None
        self._failures = self._discards = 0
        self._trouble = ""  # of the last answer or observation
        self._warned: Set[str] = set()

    def _use_horizon(self, horizon: int) -> None:
        self.horizon = horizon
        self.plan.make_room(horizon, self.strategy.max_chunks(horizon))
        self._questions.use_horizon(horizon)
        chunk_s = horizon / (self.rows_per_tick * self.rate_hz)
        self.max_age_s = chunk_s if self.safety.max_age_s is None else self.safety.max_age_s

    def begin(self, pose: Optional[np.ndarray], home: Optional[np.ndarray] = None) -> None:
        """Where the robot is, as a command, and where it shall go before the policy is asked. Nothing else is commanded
        before an answer was taken: the pose may be in the wrong units, and the server says so.

        Raises:
            ValueError: one of them is no place to be.
        """
        for what, place, ranges in (("home", home, 0.0), ("the measured pose", pose, _POSE_RANGES)):
            problem = "" if place is None else self._limiter.outside(place, ranges=ranges)
            if problem:
                raise ValueError(
                    f"{what} is no place that the limits allow: {problem}. Is it in the units of the policy's actions? "
                    "If it is right, give Safety(limits=Limits(...))"
                )
        self._home = home
        if home is not None and pose is not None:
            self._begin_blend(pose, home, Phase.HOME)

    # Answers

    def take(self, answer: Answer, tick: int, now_s: float, pose: Callable[[], Optional[np.ndarray]]) -> None:
        """Takes the answer to the last question.

        Args:
            pose: measures where the robot is.
        Raises:
            EpisodeEnded: nothing good can come from this policy.
        """
        question = self._questions.answered()
        assert answer.number == question.number
        age_s = now_s - question.asked_s
        fields = {"chunk": answer.number, "delay_ticks": tick - question.tick, "age_s": age_s, **answer.timing_ms}
        if answer.result is None:
            return self._failed(answer.failure, answer.error, tick, fields)
        result = answer.result if isinstance(answer.result, Mapping) else {}
        self._warn(result.get("warnings", ()))
        if result.get("held"):
            self._record("held by the policy", chunk=answer.number)
            self.warn("the policy made no actions, and holds", subject="held")
        rows = result.get("actions")
        problem = self.spec.problem(rows, self.spec.horizon)
        if problem:
            return self._failed("refused", problem, tick, fields)
        rows = np.asarray(rows, np.float64)
        if len(rows) > self.horizon:  # no contract says how long chunks are
            self._use_horizon(len(rows))
        if age_s > self.max_age_s:
            return self._stale(fields)
        # Of those that can be played: for one stall all rows of the next ten chunks would be promised.
        self._questions.forecast.record(tick - question.tick, is_first=answer.is_first)
        self._failures, self._is_stopped, self._trouble = 0, False, ""
        self._held = 0 if self.phase is Phase.START else self._held
        if self.phase is Phase.START and self.spec.stays.any():
            measured = self._pose_to_start_from(pose)
            if measured is not None and self.safety.blend_s > 0:
                self._record("blend", **fields)
                return self._begin_blend(measured, self._allowed(rows[0], None, is_seam=False), Phase.BLEND)
            self._last = measured if self._last is None else self._last
        self.phase = Phase.PLAY
        self._merge(question, rows, fields)

    def _pose_to_start_from(self, measure: Callable[[], Optional[np.ndarray]]) -> Optional[np.ndarray]:
        """Where the robot is; None = that is not known, and need not be."""
        try:
            pose = measure()
        except ValueError as error:
            raise EpisodeEnded(str(error)) from error
        if pose is None and (self.safety.blend_s > 0 or self.phase is Phase.HOME):
            raise EpisodeEnded(
                "a blended start needs to know where the robot is, and its pose() does not tell any more"
            )
        problem = "" if pose is None else self._limiter.outside(pose, ranges=_POSE_RANGES)
        if problem:
            raise EpisodeEnded(f"the robot is no place that the limits allow: {problem}")
        return pose

    def _stale(self, fields: Mapping[str, object]) -> None:
        self._trouble = f"an answer took {fields['age_s']:.2f} s"
        self._record("stale", max_age_s=self.max_age_s, **fields)
        self.warn(
            f"an answer came {fields['age_s']:.2f} s after its observation and is not played (max_age_s: "
            f"{self.max_age_s:.3g}); asking anew",
            subject="stale",
        )

    def _merge(self, question: Question, rows: np.ndarray, fields: Observation) -> None:
        """A chunk whose first rows are past: as many as were played since its observation, none if the robot held."""
        consumed = self.plan.position - question.start
        fields["consumed"] = consumed
        is_conditioned = isinstance(self.strategy, TrainedRTC) and question.has_prefix
        if is_conditioned and math.ceil(consumed - 1e-6) > question.delay:
            return self._discard(question, fields)
        self._discards = 0
        if consumed >= len(rows):
            self._trouble = "a chunk came when all of its rows were past"
            return self._record("too late", **fields)
        self._record("chunk", start=question.start, made_for=question.delay, **fields)
        if question.prompt != self._prompt:  # no mean of two intentions
            self.plan.clear()
            self._prompt = question.prompt
        self.plan.add(question.start, rows, question.asked_s, question.number)
        self._questions.last_start = question.start

    def _discard(self, question: Question, fields: Mapping[str, object]) -> None:
        self._discards += 1
        self._trouble = f"a chunk came later than the {question.delay} rows that it was made for"
        self._record("discarded", made_for=question.delay, **fields)
        assert isinstance(self.strategy, TrainedRTC)
        if self._discards >= self.strategy.max_discards:
            raise EpisodeEnded(
                f"{self._discards} chunks in a row came later than the {question.delay} rows that they were made for; "
                "the path is too slow for this policy: train with a larger rtc_max_delay, or use GuidedRTC"
            )

    def _failed(self, failure: str, error: str, tick: int, fields: Mapping[str, object]) -> None:
        self._trouble = error
        self._record("failed", failure=failure, error=error, **fields)
        if failure == "fatal":
            raise EpisodeEnded(error)
        # Of one kind of error the first is told; their numbers differ.
        self.warn(error, subject=error.partition(":")[0])
        if failure == "unreachable":  # The way to the server may come back; meanwhile the robot holds.
            return self._questions.pause(tick)
        self._failures += 1
        if self._failures >= self.safety.max_failures:
            raise EpisodeEnded(f"{self._failures} answers in a row were of no use, the last one: {error}")
        self._questions.pause(tick, self._failures)

    def _warn(self, warnings: object) -> None:
        texts: List[str] = [str(text) for text in warnings] if isinstance(warnings, (list, tuple)) else []
        for text in texts:
            self.warn(text, subject=text.partition(":")[0])
        if texts and not self._is_trusted and not self.safety.accept_warnings:
            raise EpisodeEnded(
                "the server finds the observation suspicious, so the robot does not start: "
                f"{'; '.join(texts[:_SHOWN])}. If this is right, start with Safety(accept_warnings=True)"
            )

    def warn(self, text: str, subject: Optional[str] = None) -> None:
        """Tells of something, once; of so many things only, as a server may find another one in every observation.

        Args:
            subject: what it is about, if the text has numbers that change.
        """
        if (subject or text) in self._warned or len(self._warned) > _MOST_WARNINGS:
            return
        self._warned.add(subject or text)
        if len(self._warned) > _MOST_WARNINGS:
            text = f"there were {_MOST_WARNINGS} different warnings; further ones are not told"
        self._record("warning", text=text)
        self._on_warning(text)

    # Commands

    def will_hold(self, now_s: float) -> bool:
        """Whether the robot holds when the policy is asked now."""
        return self.strategy.holds_while_asking or self.phase is not Phase.PLAY or self._row(now_s) is None

    def _row(self, now_s: float) -> Optional[Row]:
        return self.plan.row(self.strategy.combine, now_s - self.max_age_s)

    def command(self, tick: int, now_s: float, pose: Callable[[], Optional[np.ndarray]]) -> Command:
        """What the robot gets at this tick.

        Args:
            pose: as of `take`.
        Raises:
            EpisodeEnded: a limit was exceeded that says "stop", or the way home cannot be taken up again.
        """
        self._watch_gap(tick - self._tick)
        self._tick = tick
        if self._is_kept_from_home and self._held >= self.safety.ticks(self.safety.stop_after_s, self.rate_hz):
            measured = self._pose_to_start_from(pose)
            assert measured is not None and self._home is not None
            self._begin_blend(measured, self._home, Phase.HOME)
        if self._blend is not None:
            return self._blended(self._blend)
        row = self._row(now_s) if self.phase is Phase.PLAY else None
        command = self._hold(tick) if row is None else self._play(row, tick)
        if command.values is not None:
            self._last = command.values
        return command

    def _play(self, row: Row, tick: int) -> Command:
        if self._held >= self.safety.hold_after_ticks and self._has_played:
            self._record("hold ends", ticks=self._held)
        self._held = 0
        is_seam = row.chunk != self._last_chunk
        jump = 0.0
        if is_seam and self._last is not None and self.spec.stays.any():
            jump = float(np.abs(row.values - self._last)[self.spec.stays].max())
        # A velocity plays as much slower as the rows do.
        wanted = np.where(self.spec.stays, row.values, self.safety.speed * row.values)
        values = self._allowed(wanted, self._last, is_seam=is_seam)
        self.plan.position += self.rows_per_tick
        self._last_chunk, self._played_at, self._has_played, self._is_trusted = row.chunk, tick, True, True
        return Command(values, "row", row._replace(values=values), is_seam, jump)

    def _allowed(self, wanted: np.ndarray, last: Optional[np.ndarray], *, is_seam: bool) -> np.ndarray:
        """The command within its limits."""
        try:
            values, problem = self._limiter.within(wanted, last, is_seam=is_seam)
        except LimitExceeded as error:
            raise EpisodeEnded(f"a command would leave its limits: {error}") from error
        if problem:
            self._record("clamped", text=problem)
            self.warn(f"commands are clamped, first because {problem}", subject="clamped")
        return values

    def _hold(self, tick: int) -> Command:
        self._held += 1
        if self.phase is Phase.PLAY:
            self._watch_hold(tick)
        elif self._held == self.safety.ticks(_PATIENCE_S, self.rate_hz):
            why = f" ({self._trouble})" if self._trouble else ""
            self.warn(
                f"no answer for {_PATIENCE_S:g} s{why}; until there is one the robot stays where it is", "waiting"
            )
        if self._is_stopped or (self._last is None and self.spec.stays.any()):
            return Command(None, "none")
        if self._last is None:  # Velocities stand still without knowing where.
            return Command(np.zeros(self.spec.width), "hold")
        return Command(self.spec.hold_row(self._last), "hold")

    def _why(self, tick: int) -> str:
        """There is no row, in words."""
        asked = self._questions.pending
        waits = "" if asked is None else f"question {asked.number} is {tick - asked.tick} ticks old"
        return "; ".join(filter(None, [self._trouble, waits])) or "the policy was not asked in time"

    def _watch_hold(self, tick: int) -> None:
        """Does what has to be done in a tick without a row."""
        if self._held == 1 and self.plan.num_from(self.plan.position) > 0:
            self._record("expired", rows=self.plan.num_from(self.plan.position))
        if self._held == 1:
            self.plan.clear()
        if self._held == self.safety.hold_after_ticks and self._has_played:
            self._record("hold", why=self._why(tick))
        # A blended start asks anew when it is there.
        is_expected = self.strategy.holds_while_asking or not self._has_played
        expected = self._questions.forecast.ticks if is_expected else 0
        if self._held < expected + self.safety.ticks(self.safety.stop_after_s, self.rate_hz):
            return
        reason = f"no action for {self._held / self.rate_hz:.2f} s"
        self._start_anew(reason, why=self._why(tick))
        if self._on_stop is not None:
            self._last, self._is_stopped = None, True  # Where it is by then, nobody knows.
            self._on_stop(reason)

    def _watch_gap(self, ticks: int) -> None:
        """A loop that stood still for so long, with its process or machine, does not know where the robot is now."""
        longest = max(1, self.safety.ticks(self.safety.stop_after_s, self.rate_hz))
        if ticks > longest and self.phase is not Phase.START:
            self._blend = None
            self.plan.clear()
            self._start_anew(f"the loop stood still for {ticks / self.rate_hz:.2f} s")

    def _start_anew(self, reason: str, why: str = "") -> None:
        going_home = self.phase is Phase.HOME
        then = "goes home from where it is then" if going_home else "starts anew when the policy answers"
        beside = f" ({why})" if why else ""
        self._record("stop", reason=reason, why=why)
        self.warn(f"{reason}: the robot holds, and {then}{beside}", subject="stop")
        self.phase, self._held, self._has_played = Phase.HOME if going_home else Phase.START, 0, False
        self._questions.last_start = None

    @property
    def _is_kept_from_home(self) -> bool:
        """On its way there the loop stood still; drivers get the time of a stop to say where the robot is now."""
        return self.phase is Phase.HOME and self._blend is None

    def stop_command(self) -> Optional[np.ndarray]:
        """The last command of an episode: hold."""
        return None if self._last is None else self.spec.hold_row(self._last)

    def _begin_blend(self, pose: np.ndarray, target: np.ndarray, phase: Phase) -> None:
        num_ticks = self.safety.ticks(self.safety.blend_s, self.rate_hz)
        stays = self.spec.stays
        turned = np.flatnonzero(self.spec.are_a_turn_apart(pose, target) & self._limiter.goes_round)
        if len(turned):
            where = f"'{self.spec.names[turned[0]]}' of {pose[turned[0]]:.3g}, and {target[turned[0]]:.3g}"
            raise EpisodeEnded(
                f"the way to the start would be a whole turn: the robot is at {where} is where it shall begin, an "
                "angle that goes round in the recordings. Let the robot begin nearer"
            )
        max_step = np.where(stays, self._limiter.max_step, np.inf)
        self._blend = BlendedStart(np.where(stays, pose, 0.0), np.where(stays, target, 0.0), num_ticks, max_step)
        self.phase = phase
        self.plan.clear()

    def _blended(self, blend: BlendedStart) -> Command:
        self._last = blend.next()
        if blend.is_over:
            self._blend = None
            self.phase = Phase.START if self.phase is Phase.HOME else Phase.PLAY
            self._questions.last_start = None
        return Command(self._last, "blend")

    # Questions

    @property
    def recent_delays(self) -> Tuple[int, ...]:
        """Ticks that the last few answers took, oldest first."""
        return self._questions.forecast.delays

    @property
    def number(self) -> int:
        """Of the last question."""
        return self._questions.number

    def is_due(self, tick: int, now_s: float) -> bool:
        """Whether it is time to ask the policy."""
        if self._blend is not None or self.phase is Phase.HOME:
            return False
        fresh_s = self.plan.newest_s + self.max_age_s - now_s
        return self._questions.is_due(self.plan, self._start_of_chunk(tick), tick, fresh_s=fresh_s)

    def _start_of_chunk(self, tick: int) -> float:
        """The position of the first row of a chunk that is asked for now: that of this tick's row."""
        return self.plan.position - (self.rows_per_tick if self._played_at == tick else 0.0)

    def question(self, observation: Observation, tick: int, now_s: float) -> Dict[str, object]:
        """What to send to the policy; its number is `number`.

        Args:
            observation: of now; the row of this tick, if one was played already, is the first of the new chunk.
        """
        if self.strategy.holds_while_asking:
            self.plan.clear()
        prompt = str(observation.get("prompt"))
        keys = self._questions.ask(
            self.plan,
            self._start_of_chunk(tick),
            tick,
            now_s,
            oldest_s=now_s - self.max_age_s,
            prompt=prompt,
            is_new_prompt=prompt != self._prompt,
            record=self._record,
        )
        return {**observation, **keys}

    def ask_later(self, tick: int, why: str) -> None:
        """Not now: the next question comes after a pause."""
        self._trouble = why
        self._questions.pause(tick)
