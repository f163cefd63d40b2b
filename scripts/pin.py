"""`scripts/pin.py [--check]`: pins every dependency of every extra to one exact version, in `pyproject.toml`.

Resolves the workspace for all supported Python versions and platforms with `uv`, from scratch, and writes the
versions to `[tool.uv] constraint-dependencies`, so that a clone installs the same from any package index.
There is no lock file because that names the index it was made with.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "# Written by scripts/pin.py; change the dependencies above, then run it again.\n"
_PINS = re.compile(re.escape(BEGIN) + r"constraint-dependencies = \[\n(?:    .*\n)*\]\n")
_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)(?:\s*;\s*(?P<marker>.+))?")
# The client is for older versions, too, and `uv pip install` reads the pins of the folder that it runs in.
_WHERE = "python_version >= '3.11'"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only check that the pins can be resolved together")
    arguments = parser.parse_args(argv)
    text = (ROOT / "pyproject.toml").read_text()
    if arguments.check:
        print(f"{len(resolve(text))} pins fit together")
        return 0
    pins = resolve(without_pins(text))
    (ROOT / "pyproject.toml").write_text(with_pins(text, pins))
    print(f"wrote {len(pins)} pins to {ROOT / 'pyproject.toml'}")
    return 0


def resolve(pyproject: str) -> list[str]:
    """Exact requirements, with markers, of the workspace with all extras and groups.

    Raises:
        SystemExit: `uv` is missing, or finds no solution; its message is shown.
    """
    if shutil.which("uv") is None:
        raise SystemExit("uv is not installed; see https://docs.astral.sh/uv, or `pip install uv`")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pyproject.toml").write_text(pyproject)
        for member in ROOT.glob("packages/*/pyproject.toml"):
            copy = folder / member.relative_to(ROOT)
            copy.parent.mkdir(parents=True)
            shutil.copyfile(member, copy)
        exported = _uv(
            folder,
            *("export", "--all-extras", "--all-groups", "--all-packages", "--no-emit-workspace"),
            *("--no-hashes", "--no-header", "--no-annotate", "--quiet"),
            # One version for all Python versions: then a test on any of them says something.
            *("--fork-strategy", "fewest"),
        )
    return [pin for line in exported.splitlines() if (pin := _pin(line))]


def without_pins(pyproject: str) -> str:
    return with_pins(pyproject, [])


def with_pins(pyproject: str, pins: list[str]) -> str:
    lines = "".join(f"    {_quoted(pin)},\n" for pin in pins)
    section = f"{BEGIN}constraint-dependencies = [\n{lines}]\n"
    text, count = _PINS.subn(lambda _: section, pyproject)
    if count != 1:
        raise SystemExit(f"pyproject.toml has {count} lists of pins to replace; expected one, below the line: {BEGIN}")
    return text


def _pin(line: str) -> str | None:
    """One exported line as a requirement; None for anything but `name==version [; marker]`."""
    match = _PIN.fullmatch(line.strip())
    if match is None:
        return None
    marker = f"({match['marker']}) and {_WHERE}" if match["marker"] else _WHERE
    return f"{match['name']}=={match['version']} ; {marker}"


def _quoted(pin: str) -> str:
    return '"' + pin.replace('"', "'") + '"'


def _uv(folder: Path, *arguments: str) -> str:
    process = subprocess.run(["uv", *arguments, "--directory", str(folder)], capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"uv {arguments[0]} failed:\n{process.stderr.strip()}")
    return process.stdout


if __name__ == "__main__":
    sys.exit(main())
