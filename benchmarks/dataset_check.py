"""What `openpi dataset check` finds of mistakes that are known, and what it finds where there are none.

    python benchmarks/dataset_check.py [--table-top FOLDER] [--clean FOLDER ...] [--output dataset_check.md]

Each mistake of `tests/support/planted_mistakes.py` is planted in two base sets: an arm at 20 Hz with two cameras, and
demonstrations of the table-top (10 Hz; `openpi demo record`). It counts as found if a finding of its kind names the
episode. False alarms are findings of severity error or warning in sets without a mistake.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))

import planted_mistakes as mistakes
from openpi.data.check.findings import Report, Severity
from openpi.data.check.runner import check_dataset

ARM = mistakes.Keys("observation.state", "action", "observation.images.top", "observation.images.wrist", 1, 2, 5)
TABLE_TOP = mistakes.Keys("state", "actions", "image", "wrist_image", 1, 2, 5)
SPOILT = (3,)
IN_HALF = ("actions one step late", "in degrees", "BGR", "camera upside down", "gripper of the actions inverted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table-top", type=Path, help="recorded with `openpi demo record --episodes 12`")
    parser.add_argument("--clean", type=Path, nargs="*", default=[], help="further sets without mistakes")
    parser.add_argument("--variants", type=int, default=20, help="clean variants of the arm")
    args = parser.parse_args()
    bases = {"arm": (mistakes.arm(12), ARM)}
    if args.table_top:
        bases["table-top"] = (mistakes.read(args.table_top), TABLE_TOP)
    with tempfile.TemporaryDirectory() as folder:
        for name, (recorded, keys) in bases.items():
            print(f"\n| {name}: mistake | in | found | further findings |\n|---|---|---|---|", flush=True)
            for row in spoilt(recorded, keys, Path(folder, name), use_videos=name == "arm"):
                print(row, flush=True)
        print(
            "\n| clean set | episodes | pictures | errors, warnings | s of processor |\n|---|---|---|---|---|",
            flush=True,
        )
        for row in clean(args.clean, args.variants, Path(folder, "clean")):
            print(row, flush=True)


def spoilt(recorded: mistakes.Recorded, keys: mistakes.Keys, folder: Path, *, use_videos: bool) -> Iterator[str]:
    half = tuple(range(0, len(recorded.episodes), 2))
    for name, (mistake, code) in mistakes.IN_EPISODES.items():
        for episodes in (SPOILT, half) if name in IN_HALF else (SPOILT,):
            # Signals are judged by tables alone, and pictures are dear to write.
            base = recorded if code.startswith("videos.") else mistakes.without_cameras(recorded)
            root = mistakes.plant(base, mistake, keys, episodes).write(folder / f"{name} {len(episodes)}")
            report = check_dataset(root)
            hits = {f.episode for f in report.findings if f.code == code} & set(episodes)
            where = "one episode" if len(episodes) == 1 else f"{len(episodes)} of {len(recorded.episodes)} episodes"
            if len(hits) < len(episodes) and len(episodes) > 1:  # of two equal halves either may be meant
                others = {f.episode for f in report.findings if f.code == code} - set(episodes)
                hits = max(hits, others, key=len)
            yield _row(name, where, f"{len(hits)}/{len(episodes)}", report, code)
    base = recorded.write(folder / "base")
    for name, (spoil, code) in mistakes.IN_FILES.items():
        yield _in_files(name, spoil, code, mistakes.copy(base, folder / name))
    if use_videos:
        base = recorded.write(folder / "base with video", use_videos=True)
        for name, (spoil, code) in mistakes.IN_VIDEO_FILES.items():
            yield _in_files(name, spoil, code, mistakes.copy(base, folder / name))


def clean(folders: list[Path], variants: int, scratch: Path) -> Iterator[str]:
    for seed in range(variants):
        fps, num_frames = (10, 20, 30, 50)[seed % 4], (30, 50, 60, 100)[seed % 4]
        recorded = mistakes.arm(6 + seed % 5, seed=100 + seed, fps=fps, num_frames=num_frames)
        root = recorded.write(scratch / str(seed), use_videos=seed % 10 == 9)
        yield _clean_row(f"arm, seed {100 + seed}, {fps} Hz", root)
    for root in folders:
        yield _clean_row(root.name if root.name != "dataset" else root.parent.name, root)


def _clean_row(name: str, root: Path) -> str:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    report = check_dataset(root)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - used
    alarms = [f"{f.code} ({f.place})" for f in report.findings if f.severity is not Severity.INFO]
    return f"| {name} | {len(report.lengths)} | {report.num_pictures} | {', '.join(alarms) or 'none'} | {used:.1f} |"


def _in_files(name: str, spoil, code: str, root: Path) -> str:
    spoil(root)
    report = check_dataset(root)
    return _row(name, "files", "yes" if any(f.code == code for f in report.findings) else "NO", report, code)


def _row(name: str, where: str, found: str, report: Report, code: str) -> str:
    others = sorted({f.code for f in report.findings if f.code != code and f.severity is not Severity.INFO})
    return f"| {name} | {where} | {found} | {', '.join(others)} |"


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"\n{time.monotonic() - started:.0f} s", file=sys.stderr)
