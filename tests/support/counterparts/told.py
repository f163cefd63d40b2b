"""What a program under test told its counterpart: lines of JSON in the file that COUNTERPART_LOG names."""

import json
import os
import threading
from pathlib import Path

_lock = threading.Lock()


def write(kind: str, **fields: object) -> None:
    with _lock, Path(os.environ["COUNTERPART_LOG"]).open("a") as file:
        file.write(json.dumps({"kind": kind, **fields}) + "\n")


def fault(name: str) -> bool:
    """Whether the test wants this to go wrong."""
    return name in os.environ.get("COUNTERPART_FAULTS", "").split(",")
