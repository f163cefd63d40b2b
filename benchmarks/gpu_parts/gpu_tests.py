"""The tests that need a GPU, with the pytest that is there."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_parts.records import Records
from gpu_parts.sizes import Size

ROOT = Path(__file__).parents[2]
_SECONDS, _SMOKE_SECONDS = 80, 400  # then what is done is told
_OUTCOME = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


def run(size: Size, records: Records) -> None:
    """Raises RuntimeError if one fails; ModuleNotFoundError without pytest."""
    for name in ("pytest", "hypothesis"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
    is_smoke, files = size.name == "smoke", _files()
    output, trouble = _output(files[:1] if is_smoke else files, _SMOKE_SECONDS if is_smoke else _SECONDS)
    outcomes = _OUTCOME.findall(output)
    counts = {
        kind: str(sum(found == kind for _, found in outcomes)) for kind in ("PASSED", "SKIPPED", "FAILED", "ERROR")
    }
    bad = [f"{kind}: {name}" for name, kind in outcomes if kind in ("FAILED", "ERROR")]
    records.write("tests", "pytest -m gpu", texts=counts, note="; ".join([*bad, *trouble]))
    if bad or trouble or not outcomes:
        raise RuntimeError("; ".join([*bad, *trouble]) or "no test ran")


def _files() -> list[Path]:
    """Only they are collected: others need what a bare machine has not. The smallest one first."""
    found = [file for file in (ROOT / "tests").glob("*/test_*.py") if "mark.gpu" in file.read_text()]
    return sorted(found, key=lambda file: file.stat().st_size)


def _output(files: list[Path], seconds: float) -> tuple[str, list[str]]:
    """What pytest printed, and what was wrong besides tests."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-v",
        "-p",
        "no:cacheprovider",
        *_options(),
        *map(str, files),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # libraries bring some that need what is not there
    with tempfile.TemporaryFile("w+") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
            trouble = [] if code in (0, 1) else [f"pytest ended with {code}"]
        except subprocess.TimeoutExpired:
            trouble = [f"cut after {seconds} s"]
        file.seek(0)
        output = file.read()
    print(output[-8000:], flush=True)
    return output, trouble


def _options() -> list[str]:
    """Other versions than ours may warn, which is no failure here; plugins may not be there."""
    options = ["-o", "filterwarnings=default", "-o", "addopts=--strict-markers"]
    has_timeout = importlib.util.find_spec("pytest_timeout") is not None
    return [*options, *(("-p", "pytest_timeout") if has_timeout else ("-o", "timeout="))]
