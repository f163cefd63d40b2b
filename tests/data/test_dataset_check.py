"""A dataset with known mistakes: each is found, with episode, frames and name; good ones are silent."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

import planted_mistakes as mistakes
from openpi.cli import main as cli
from openpi.cli.data import _dataset_report, dataset
from openpi.data.check import runner
from openpi.data.check.findings import GROUPS, Finding, Report, Severity, by_kind
from openpi.data.check.repair import repair
from openpi.data.check.runner import check_dataset, check_open
from openpi.data.check.subject import EVERYTHING, Reading
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.shared.pools import Processes
from paths import GOLDEN

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STATE, ACTION, TOP, WRIST = "observation.state", "action", "observation.images.top", "observation.images.wrist"
KEYS = mistakes.Keys(STATE, ACTION, TOP, WRIST, joint=1, other_joint=2, gripper=5)
NUM_GOOD = 20
# Each in an episode of its own, all in one dataset, in which most episodes are good.
PLANTED = [name for name in mistakes.IN_EPISODES if name not in ("camera grey", "actions in degrees")]


@pytest.fixture(scope="module")
def arm() -> mistakes.Recorded:
    return mistakes.arm(12)


@pytest.fixture(scope="module")
def good(arm, tmp_path_factory) -> Path:
    return arm.write(tmp_path_factory.mktemp("good") / "arm")


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> tuple[Path, Report]:
    recorded = mistakes.arm(NUM_GOOD + len(PLANTED), num_frames=32, size=(16, 24), seed=7)
    for episode, name in enumerate(PLANTED, start=NUM_GOOD):
        recorded = mistakes.plant(recorded, mistakes.IN_EPISODES[name][0], KEYS, [episode])
    root = recorded.write(tmp_path_factory.mktemp("spoilt") / "arm")
    return root, check_dataset(root)


def alarms(report: Report) -> list[str]:
    return [f"{f.code} {f.place}: {f.found}" for f in report.findings if f.severity is not Severity.INFO]


def of_code(findings, code: str) -> list[Finding]:
    return [finding for finding in findings if finding.code == code]


@pytest.mark.parametrize("name", PLANTED)
def test_each_mistake_is_found_in_its_episode_and_no_other(name, spoilt):
    code, episode = mistakes.IN_EPISODES[name][1], NUM_GOOD + PLANTED.index(name)
    found = spoilt[1].per_episode.get(episode, [])
    assert code in {finding.code for finding in found}
    severe = {finding.code for finding in found if finding.severity is not Severity.INFO}
    assert severe == {code}, "one mistake is told once"


def test_episodes_without_a_mistake_are_not_accused_of_those_of_others(spoilt):
    assert not [f for f in spoilt[1].findings if f.severity is not Severity.INFO and (f.episode or 0) < NUM_GOOD]


@pytest.mark.parametrize(
    ("name", "column", "dimension", "frames"),
    [
        ("jump of 2.5 rad", STATE, "shoulder", (11, 13)),
        ("jump of the actions", ACTION, "shoulder", (14, 15)),
        ("gripper stuck", STATE, "gripper", None),
        ("joint stuck", STATE, "shoulder", None),
        ("sign of an action", ACTION, "shoulder", None),
        ("joints of the actions swapped", ACTION, "shoulder, elbow", None),
        ("camera black", TOP, None, None),
        ("idle for long", None, None, (10, 110)),
    ],
)
def test_a_finding_names_column_dimension_and_frames(name, column, dimension, frames, spoilt):
    code, episode = mistakes.IN_EPISODES[name][1], NUM_GOOD + PLANTED.index(name)
    [finding] = [f for f in spoilt[1].per_episode[episode] if f.code == code and f.column == column]
    assert finding.dimension == dimension
    assert frames is None or finding.frames == frames
    assert finding.found and finding.expected and finding.fix


@pytest.mark.parametrize("name", ["actions one step late", "in degrees", "gripper of the actions inverted"])
def test_a_mistake_of_half_of_the_episodes_is_found_in_these(name, arm):
    mistake, code = mistakes.IN_EPISODES[name]
    half = range(0, 12, 2)
    found = in_tables(mistakes.plant(arm, mistake, KEYS, half))
    assert {finding.episode for finding in of_code(found, code)} == set(half)


@pytest.mark.parametrize("name", [None, "BGR", "cameras exchanged", "camera upside down"])
def test_a_lamp_that_changes_hides_no_camera_that_does(name, tmp_path):
    """A texture of many colors, 10 % more or less light: BGR in three of ten episodes passed for right."""
    rng = np.random.default_rng(3)
    recorded = mistakes.arm(10, size=(48, 64))
    walls = {key: np.kron(rng.uniform(-60, 60, (6, 8, 3)), np.ones((8, 8, 1))) for key in (TOP, WRIST)}
    for episode, frames in enumerate(recorded.episodes):
        lamp = rng.uniform(0.85, 1.15)
        lit = {key: (np.clip((frames[key] + walls[key]) * lamp, 0, 255)).astype(np.uint8) for key in walls}
        recorded = recorded.replace(episode, {**frames, **lit})
    code = None
    if name is not None:
        mistake, code = mistakes.IN_EPISODES[name]
        recorded = mistakes.plant(recorded, mistake, KEYS, range(3))
    report = check_dataset(recorded.write(tmp_path / "arm"))
    found = [finding for finding in report.findings if finding.code.startswith("videos.")]
    assert {finding.episode for finding in found} == (set() if name is None else {0, 1, 2})
    assert {finding.code for finding in found} <= {code}


@pytest.mark.parametrize("num_episodes", [5, 12])
def test_a_state_in_another_unit_than_the_actions_in_all_episodes_is_found(num_episodes):
    """State in degrees, actions in radians: "nothing found"."""
    recorded = mistakes.plant(mistakes.arm(num_episodes), mistakes.actions_in_degrees, KEYS, range(num_episodes))
    [finding] = of_code(in_tables(recorded), "consistency.units")
    assert finding.episode is None and finding.severity is Severity.ERROR
    assert "times as little" in finding.found and "as if it were in radians and they in degrees" in finding.found
    both = mistakes.plant(mistakes.arm(num_episodes), mistakes.in_degrees, KEYS, range(num_episodes))
    assert not of_code(in_tables(both), "consistency.units")


def test_what_a_check_does_grows_with_the_episodes_and_not_with_their_square():
    """1,600 episodes held up the start of a training for minutes: each was compared with all, anew."""

    def calls(num_episodes: int) -> int:
        recorded = mistakes.without_cameras(mistakes.arm(num_episodes, num_frames=30))
        count = 0

        def counted(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(counted)
        try:
            in_tables(recorded)
        finally:
            sys.setprofile(None)
        return count

    calls(6)  # what is imported and compiled on the way
    assert calls(120) < 4.4 * calls(30)


def test_actions_that_are_late_in_all_episodes_are_found_without_another_to_compare_with(arm):
    """The arm takes 1.7 frames to follow: a frame less is still something that a robot does."""
    for num_frames, severity in ((2, Severity.WARNING), (3, Severity.ERROR)):
        recorded = arm
        for _ in range(num_frames):
            recorded = mistakes.plant(recorded, mistakes.late, KEYS, range(12))
        [finding] = of_code(in_tables(recorded), "actions.late")
        assert finding.episode is None and finding.severity is severity
        assert "shift the column back" in finding.fix


def with_a_quick_joint(arm: mistakes.Recorded, joint: int) -> mistakes.Recorded:
    """The arm follows in 1.7 frames, and this joint of it in 0.7 to 1.1, in each episode in another time."""
    rng = np.random.default_rng(1)
    for episode, frames in enumerate(arm.episodes):
        share, action, state = rng.uniform(-0.1, 0.3), frames[ACTION][:, joint], frames[STATE].copy()
        state[1:, joint] = (1 - share) * action[:-1] + share * action[1:]
        arm = arm.replace(episode, {**frames, STATE: state})
    return arm


def test_a_joint_that_follows_sooner_than_the_others_in_every_episode_is_not_late(arm):
    assert of_code(in_tables(with_a_quick_joint(arm, 4)), "actions.late") == []


@pytest.mark.parametrize(("frames", "code"), [(1, "actions.late"), (-1, "actions.early")])
def test_a_joint_is_compared_with_itself_in_the_other_episodes(arm, frames, code):
    quick = with_a_quick_joint(arm, 4)
    action = quick.episodes[3][ACTION].copy()
    action[:, 4] = np.roll(action[:, 4], frames)
    action[:2, 4], action[-2:, 4] = action[2, 4], action[-3, 4]
    found = of_code(in_tables(quick.replace(3, {**quick.episodes[3], ACTION: action})), code)
    assert [(finding.episode, finding.dimension) for finding in found] == [(3, "wrist_turn")]
    assert "1 frame later, as in the other episodes" in found[0].expected


def in_tables(recorded: mistakes.Recorded) -> tuple[Finding, ...]:
    """What the fast half says, of a dataset on disk without its cameras."""
    with tempfile.TemporaryDirectory() as folder:
        root = mistakes.without_cameras(recorded).write(Path(folder, "arm"))
        return check_open(LeRobotDataset(root), EVERYTHING)


@pytest.mark.parametrize("name", mistakes.IN_FILES)
def test_what_is_wrong_in_files_is_found(name, good, tmp_path):
    spoil, code = mistakes.IN_FILES[name]
    root = mistakes.copy(good, tmp_path / "arm")
    spoil(root)
    found = of_code(check_dataset(root, decodes=code.startswith("videos")).findings, code)
    assert found and all(f.found for f in found)


def test_a_spoilt_video_is_told_for_its_episodes_and_the_other_cameras_are_looked_at(tmp_path):
    recorded = mistakes.arm(3, size=(32, 48))
    base = recorded.write(tmp_path / "arm", use_videos=True)
    assert not alarms(check_dataset(base))
    for number, (spoil, code) in enumerate(mistakes.IN_VIDEO_FILES.values()):
        root = mistakes.copy(base, tmp_path / str(number))
        spoil(root)
        report = check_dataset(root)
        found = of_code(report.findings, code)
        assert {finding.episode for finding in found} == {0, 1, 2} and found[0].column in (TOP, WRIST)
        assert report.num_pictures or code == "videos.layout"


def test_an_episode_of_one_frame_is_a_finding_and_ends_nothing(arm, tmp_path):
    frames = {key: values[:1] for key, values in arm.episodes[4].items()}
    report = check_dataset(arm.replace(4, frames).write(tmp_path / "arm"))
    assert {(f.code, f.episode) for f in report.findings if f.severity is Severity.ERROR} == {("episodes.too-short", 4)}


@pytest.mark.parametrize(
    "root",
    [info.parents[1] for info in sorted(GOLDEN.glob("lerobot_v*/*/meta/info.json"))],
    ids=lambda root: f"{root.parent.name}-{root.name}",
)
def test_datasets_written_by_lerobot_are_silent(root):
    assert not alarms(check_dataset(root))


def test_good_datasets_of_other_rates_and_lengths_are_silent(good, tmp_path):
    assert not alarms(check_dataset(good))
    for fps, num_frames in ((10, 25), (50, 90)):
        root = mistakes.arm(6, fps=fps, num_frames=num_frames, seed=fps, size=(16, 24)).write(tmp_path / str(fps))
        assert not alarms(check_dataset(root))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from((10, 20, 50)), st.integers(3, 12), st.floats(0.01, 2.0))
@example(1505, 10, 7, 1.0)  # six of seven grippers begin in the lower third, and one in the upper
@example(941747560, 50, 5, 1.384912369740747)  # four of five at one end
def test_smooth_random_trajectories_give_no_finding(seed, fps, num_episodes, amplitude):
    rng = np.random.default_rng(seed)
    base = mistakes.arm(1, fps=fps)
    episodes = []
    for _ in range(num_episodes):
        n = int(rng.integers(fps, 4 * fps))
        t = np.arange(n + 1)[:, None] / fps
        waves = (rng.normal(size=6) * np.sin(t * rng.uniform(0.5, 4, 6) + rng.uniform(0, 6, 6)) for _ in range(3))
        path = (amplitude * sum(waves) + rng.normal(0, amplitude / 300, (n + 1, 6))).astype(np.float32)
        episodes.append({STATE: path[:-1], ACTION: path[1:]})
    features = {key: base.features[key] for key in (STATE, ACTION)}
    recorded = mistakes.Recorded(fps, features, episodes, ["wave"] * num_episodes)
    assert not [f for f in in_tables(recorded) if f.severity is not Severity.INFO]


def test_the_command_says_what_it_found_as_table_json_and_exit_code(spoilt, good, capsys):
    assert cli.main(["dataset", "check", str(good), "--no-pictures"]) == 0
    assert "nothing found in 12 episodes" in capsys.readouterr().out
    dataset.show(spoilt[1])
    told = capsys.readouterr().out
    assert "anomalies.jump" in told and "shoulder" in told and "--data.exclude-episodes" in told
    assert cli.main(["dataset", "check", str(spoilt[0]), "--no-pictures", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["counts"]["error"] > 10 and document["num_episodes"] == NUM_GOOD + len(PLANTED)
    assert {f["code"].split(".")[0] for f in document["findings"]} <= set(GROUPS)
    assert cli.main(["dataset", "check", str(good / "nowhere")]) == 2
    assert cli.main(["dataset", "check", str(good), "--fix", str(good)]) == 2


def test_init_says_what_the_fast_half_finds(spoilt, tmp_path, capsys):
    assert (
        cli.main(["init", "--dataset", str(spoilt[0]), "--output", str(tmp_path / "drafted_spoilt.py"), "--yes"]) == 0
    )
    told = capsys.readouterr().out
    assert "anomalies.jump at observation.state/shoulder, episode" in told or "anomalies.jump at episode" in told
    assert "openpi dataset check" in told


def test_init_leaves_the_tables_of_a_large_dataset_to_a_command_of_its_own(good, tmp_path, capsys, monkeypatch):
    """Of 95,600 episodes it said nothing for more than five minutes."""
    monkeypatch.setattr(runner, "_MAX_EPISODES", 2)
    monkeypatch.setattr(runner, "open_subject", None)
    assert cli.main(["init", "--dataset", str(good), "--output", str(tmp_path / "of_large.py"), "--yes"]) == 0
    assert "were not looked at, for their size" in capsys.readouterr().out


def test_orientations_that_are_written_anew_in_every_episode_are_found(tmp_path):
    """A tool that points down and wobbles: the numbers of most forms jump, the tool does not."""
    angles = np.pi + 0.3 * np.sin(np.arange(60) / 9 + np.arange(6)[:, None])
    forms = {
        "quaternion": lambda turn: turn.as_quat(canonical=True),
        "rotation_vector": lambda turn: turn.as_rotvec(),
        "angles": lambda turn: turn.as_euler("xyz"),
        "degrees": lambda turn: turn.as_euler("xyz", degrees=True),
        "six": lambda turn: turn.as_matrix()[:, :, :2].reshape(-1, 6),  # this form never jumps
    }
    turns = [Rotation.from_rotvec(np.outer(angle, [1, 0, 0])) for angle in angles]
    episodes = [{f"observation.{key}": form(turn).astype(np.float32) for key, form in forms.items()} for turn in turns]
    features = {key: {"dtype": "float32", "shape": [v.shape[1]]} for key, v in episodes[0].items()}
    with LeRobotWriter(tmp_path / "turns", fps=30, features=features) as writer:
        for frames in episodes:
            writer.add_episode(frames, "turn")
    found = check_dataset(tmp_path / "turns").findings
    told = {f"{f.code} {f.column}" for f in found if f.severity is not Severity.INFO}
    assert told == {f"anomalies.wrap observation.{key}" for key in forms if key != "six"}
    assert "observation.degrees/1, 2" in {kind.where for kind in by_kind(found)}, "what is alike is told once"


def test_an_angle_beside_positions_is_no_rotation_vector_and_a_gripper_no_part_of_a_quaternion(tmp_path):
    """As in sets of LIBERO: "frames were lost, or the sensor failed" in a third of the episodes, and a quaternion made
    of three small changes and the gripper's -1 and 1."""
    rng, episodes = np.random.default_rng(0), []
    for _ in range(8):
        times = np.linspace(0, 6 * np.pi, 90)[:, None] + rng.uniform(0, 6, 7)
        position, rotation = 0.1 * np.sin(times[:, :3]), 0.3 * np.sin(times[:, 3:6])
        angle = (2 * np.pi + rotation[:, :1]) % (2 * np.pi) - np.pi  # around pi
        gripper = np.where(np.sin(times[:, 6:]) > 0, 1.0, -1.0)
        state = np.concatenate([position, angle, rotation[:, 1:]], axis=1)
        actions = np.concatenate([position, 0.1 * rotation, gripper], axis=1)
        episodes.append({"state": state.astype(np.float32), "actions": actions.astype(np.float32)})
    names = {"state": None, "actions": [f"motor_{i}" for i in range(7)]}
    features = {key: {"dtype": "float32", "shape": [v.shape[1]], "names": names[key]} for key, v in episodes[0].items()}
    with LeRobotWriter(tmp_path / "libero", fps=10, features=features) as writer:
        for frames in episodes:
            writer.add_episode(frames, "turn")
    found = {(f.code, f.signal) for f in check_dataset(tmp_path / "libero").findings if f.code.startswith("anomalies")}
    assert found == {("anomalies.wrap", "state/3")}


def test_several_processes_find_the_same(spoilt, monkeypatch):
    monkeypatch.setattr("openpi.data.check.runner._WORTH_PROCESSES", 1)
    assert check_dataset(spoilt[0], pool=Processes(2)).findings == spoilt[1].findings


def test_a_recipe_says_which_columns_count_and_how_long_chunks_are(good):
    reading = Reading(action_keys=(ACTION,), columns=(STATE, ACTION, WRIST), horizon=44, excluded=frozenset({0}))
    report = check_dataset(good, reading)
    short = of_code(report.findings, "episodes.too-short")
    assert short and all(f.severity is Severity.WARNING and "44" in f.expected for f in short)
    assert report.num_pictures == 11 * 6 and not any(f.episode == 0 for f in report.findings)


def test_the_fix_writes_times_counts_and_statistics_anew_and_leaves_the_dataset_alone(good, tmp_path, capsys):
    root, fixed = mistakes.copy(good, tmp_path / "arm"), tmp_path / "fixed"
    for spoil in (mistakes.a_lost_time, mistakes.wrong_totals, mistakes.stale_statistics):
        spoil(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert cli.main(["dataset", "check", str(root), "--no-pictures", "--fix", str(fixed)]) == 1
    assert "timestamp of 1 files" in capsys.readouterr().err
    page = tmp_path / "report.html"
    assert cli.main(["dataset", "check", str(fixed), "--no-pictures", "--report", str(page)]) == 0
    assert "Dataset check" in page.read_text()
    assert {path: path.read_bytes() for path in before} == before
    assert not alarms(check_dataset(fixed))
    ours, theirs = LeRobotDataset(fixed), LeRobotDataset(good)
    for key in (STATE, ACTION, "timestamp", "index"):
        np.testing.assert_array_equal(ours.column(key), theirs.column(key))
    np.testing.assert_array_equal(ours[30][TOP], theirs[30][TOP])
    [table] = fixed.glob("data/*/*.parquet")
    assert pq.read_schema(table).metadata == pq.read_schema(next(good.glob("data/*/*.parquet"))).metadata
    assert not list(tmp_path.glob(".*tmp*"))
    for path in (fixed / "meta").rglob("*.*"):
        path.write_bytes(b"changed in place")  # as LeRobot's tools and some editors do
    assert {path: path.read_bytes() for path in before} == before


def test_quantiles_that_a_merge_has_widened_are_told_as_such_and_computed_anew_on_request(good, tmp_path):
    root = mistakes.copy(good, tmp_path / "merged")
    path = root / "meta/stats.json"
    stats, dataset = json.loads(path.read_text()), LeRobotDataset(root)
    parts = [dataset.column(ACTION)[begin:end] for begin, end in dataset.episode_bounds]
    stats[ACTION]["q01"] = np.min([np.quantile(part, 0.01, axis=0) for part in parts], axis=0).tolist()
    stats[ACTION]["q99"] = np.max([np.quantile(part, 0.99, axis=0) for part in parts], axis=0).tolist()
    path.unlink()
    path.write_text(json.dumps(stats))
    report = check_dataset(root, decodes=False)
    [told] = of_code(report.findings, "statistics.conservative")
    assert (told.severity, told.column) == (Severity.INFO, ACTION)
    assert not of_code(check_dataset(good, decodes=False).findings, "statistics.conservative")
    repair(root, tmp_path / "fixed")
    fixed = json.loads((tmp_path / "fixed/meta/stats.json").read_text())
    np.testing.assert_allclose(fixed[ACTION]["q01"], np.quantile(dataset.column(ACTION), 0.01, axis=0), atol=1e-6)
    assert fixed[STATE] == stats[STATE]


@pytest.mark.skipif(BROWSER is None, reason="needs chromium (Debian: apt-get install chromium)")
def test_a_browser_shows_the_report_with_pictures_and_marked_signals(spoilt, tmp_path):
    page, shot = tmp_path / "report.html", Path(os.environ.get("OPENPI_SCREENSHOT", tmp_path / "report.png"))
    shown = [f for f in spoilt[1].findings if f.episode is None or f.code in ("anomalies.jump", "videos.black")]
    _dataset_report.write(dataclasses.replace(spoilt[1], findings=tuple(shown)), spoilt[0], page)
    text = page.read_text()
    assert 'src="http' not in text and "<script" not in text
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1250,3000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", "--dump-dom", page.as_uri()]
    dump = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert shot.stat().st_size > 20_000
    for words in ("Dataset check", "anomalies.jump", "data:image/jpeg", "polyline", f"{ACTION}/shoulder", "line other"):
        assert words in dump
