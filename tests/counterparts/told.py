"""What a program under test told its counterpart: lines of JSON in the file that COUNTERPART_LOG names."""

import json
import os
import threading

_lock = threading.Lock()


def write(kind: str, **fields: object) -> None:
    with _lock, open(os.environ["COUNTERPART_LOG"], "a") as file:
        file.write(json.dumps({"kind": kind, **fields}) + "\n")


def fault(name: str) -> bool:
    """Whether the test wants this to go wrong."""
    return name in os.environ.get("COUNTERPART_FAULTS", "").split(",")
