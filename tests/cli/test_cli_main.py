"""The command itself, whatever comes behind it."""

import logging
import os
import subprocess
import sys

import pytest

from openpi.cli import console
from openpi.cli.main import main


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does, a little later
    command = [sys.executable, "-m", "openpi.cli.main", *words]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", ["client-check", "demo", "doctor", "explain", "infer", "replay", "train", "trials"])
def test_help_begins_with_what_a_command_is_for(name, capsys):
    """What few need, such as processes of several nodes, stands at the end."""
    try:
        assert main([name, "--help"]) == 0
    except SystemExit as left:
        assert left.code == 0
    usage, purpose, *_ = capsys.readouterr().out.split("\n\n")
    assert usage.startswith(f"usage: openpi {name}") and purpose.startswith(("`openpi", "Trains", "Fine-tunes"))


def test_what_others_wrote_into_files_moves_no_cursor(capsys):
    name = "block\x1b[2J\r\x07 für"
    console.refuse(ValueError(f"no task {name!s}\nfound: {name}"), "openpi")
    assert (
        capsys.readouterr().err == "openpi: no task " + "block\\x1b[2J\\r\\x07 für\nfound: block\\x1b[2J\\r\\x07 für\n"
    )
    record = logging.makeLogRecord({"msg": "episode of %s", "args": (name,)})
    assert console.Formatter().format(record) == "episode of block\\x1b[2J\\r\\x07 für"
