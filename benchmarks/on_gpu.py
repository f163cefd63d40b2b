"""Everything that a GPU has to tell about this project, in one command, on a machine where nothing can be installed.

    python benchmarks/on_gpu.py [--only PART ...] [--limit-s 480] [--out on_gpu]
    python benchmarks/on_gpu.py --smoke --out FOLDER         # tiny models, on a CPU: shows that it runs

The most valuable parts come first, each in a process of its own with a limit of its own. `records.jsonl` and
`on_gpu.md` in the folder grow as results come, so what is cut leaves what was done; a second run with the same folder
adds to it. `log.txt` has all that was printed. PyTorch or JAX, NumPy and the little that the model's modules import are
enough: a part whose library is missing is skipped and says which. Needs no network and no checkpoint. Exit code 1 if a
part failed.
"""

import argparse
import contextlib
import datetime
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "packages/openpi-client/src")]

from gpu_parts.page import page  # noqa: E402
from gpu_parts.records import Records  # noqa: E402
from gpu_parts.sizes import FULL, SMOKE  # noqa: E402
from gpu_parts.start import STARTED  # noqa: E402
from gpu_parts.table import PARTS, Part  # noqa: E402

PAGE, LOG = "on_gpu.md", "log.txt"
_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "JAX_COMPILATION_CACHE_DIR": "jax"}
_ENDING_S = 5.0  # of the limit, for the last page
# What each framework is told: PyTorch's parts use JAX to trace a plan, which needs no device.
_TOLD = {"pytorch": {"JAX_PLATFORMS": "cpu"}, "jax": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of: {', '.join(PARTS)}; a prefix names several")
    parser.add_argument("--limit-s", type=float, default=480, help="for everything; what does not fit is left out")
    parser.add_argument("--out", type=Path, default=Path("on_gpu"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; parts of a framework share a process")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.child:
        return run_here(args.child, args.out, is_smoke=args.smoke)
    parts = chosen(args.only)
    groups = by_framework(parts) if args.smoke else [[part] for part in parts]
    return run_all(groups, args)


def chosen(names: Sequence[str] | None) -> list[Part]:
    """In the order of the table. Ends the program for a name that none has."""
    if names is None:
        return list(PARTS.values())
    for name in names:
        if not any(part.startswith(name) for part in PARTS):
            raise SystemExit(f"there is no part '{name}'; there are: {', '.join(PARTS)}")
    return [part for name, part in PARTS.items() if name.startswith(tuple(names))]


def by_framework(parts: Sequence[Part]) -> list[list[Part]]:
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.framework, []).append(part)
    return list(groups.values())


# --- the run ------------------------------------------------------------------------------------------------------


def run_all(groups: Sequence[Sequence[Part]], args: argparse.Namespace) -> int:
    """Each group in a process of its own; 1 if a part failed, else 0."""
    end = time.monotonic() + args.limit_s - _ENDING_S
    records = Records(args.out)
    records.write("run", **_setting(), gpu=not args.smoke and _has_gpu())
    command = shlex.join(["python", "benchmarks/on_gpu.py", *sys.argv[1:]])
    with caches():
        for group in groups:
            left = end - time.monotonic()
            if args.smoke:
                run_apart(group, left, args, records)
            elif left < group[0].least_s:
                records.write(group[0].name, "status", state="left out", why=f"{left:.0f} s were left")
            else:
                run_apart(group, min(left, group[0].limit_s), args, records)
            write_page(args.out, command)
    print((args.out / PAGE).read_text())
    return int(any(is_bad(record, groups) for record in records.read()))


def is_bad(record: dict[str, Any], groups: Sequence[Sequence[Part]]) -> bool:
    """Whether it is of a part of this run that was not left out or skipped, and not done either."""
    is_of_run = any(record["part"] == part.name for group in groups for part in group)
    return is_of_run and record.get("state") in ("failed", "stopped")


def write_page(folder: Path, command: str) -> None:
    unfinished = folder / f"{PAGE}.new"
    unfinished.write_text(page(Records(folder).read(), command))
    unfinished.replace(folder / PAGE)


@contextlib.contextmanager
def caches() -> Iterator[None]:
    """Folders for what is compiled, empty at first and gone at the end; those that are set already stay."""
    with tempfile.TemporaryDirectory() as folder:
        for variable, name in _CACHES.items():
            os.environ.setdefault(variable, f"{folder}/{name}")
        yield


def _setting() -> dict[str, str]:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        done = ""
    return {"date": str(datetime.date.today()), "commit": done or "unknown"}


def _has_gpu() -> bool:
    """As the kernel tells; no framework is loaded for it."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def run_apart(group: Sequence[Part], limit_s: float, args: argparse.Namespace, records: Records) -> None:
    """In another process, whose whole group is killed at the limit."""
    names = [part.name for part in group]
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(args.out), "--child", *names]
    told = {STARTED: str(time.time()), "PYTHONUNBUFFERED": "1"}
    environment = _TOLD[group[0].framework] | os.environ | told
    paths = [str(ROOT / "src"), str(ROOT / "packages/openpi-client/src"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    start = time.monotonic()
    with (args.out / LOG).open("a") as log:
        process = subprocess.Popen(
            [*command, *(["--smoke"] if args.smoke else [])],
            env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit_s)
            why = f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            why = f"not done after {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # compilers and clients, too
            process.wait()
    seconds = time.monotonic() - start
    told_of = {r["part"] for r in records.read() if r["case"] == "status" and r.get("process") == process.pid}
    for name in names:
        if name not in told_of:
            records.write(name, "status", state="stopped", why=why, seconds=seconds)


def run_here(names: Sequence[str], folder: Path, *, is_smoke: bool) -> int:
    """The parts, one after another; one that fails does not keep the others from running."""
    size, records = (SMOKE if is_smoke else FULL), Records(folder)
    logging.basicConfig(level=logging.INFO)  # what was chosen there, such as kernels for attention
    for name in names:
        print(f"== {name}", flush=True)
        start, cpu_start = time.monotonic(), time.process_time()
        try:
            PARTS[name].run(size, records)
            state, why = "done", ""
        except ModuleNotFoundError as error:
            traceback.print_exc()
            # One of ours that is not found is a fault.
            is_ours = (error.name or "openpi").partition(".")[0] in ("openpi", "openpi_client", "gpu_parts")
            state, why = ("failed" if is_ours else "skipped"), f"{error}"
        except Exception as error:
            traceback.print_exc()
            state, why = "failed", f"{type(error).__name__}: {error}"
        took = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu_start}
        records.write(name, "status", state=state, why=why[:400], **took, process=os.getpid())
    return 0


if __name__ == "__main__":
    sys.exit(main())
