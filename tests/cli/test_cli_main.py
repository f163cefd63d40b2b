"""The command itself, whatever comes behind it."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does, a little later
    command = [sys.executable, "-m", "openpi.cli.main", *words]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")
