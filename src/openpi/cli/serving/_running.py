"""A server in this process, from its port to its end: what `serve`, `serve --dummy` and `serve_policy.py` share."""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from openpi.cli.console import refuse
from openpi.shared import whole_file
from openpi_client.base_policy import Metadata
from openpi_client.connection import api_key_of

if TYPE_CHECKING:
    from openpi.serving.catalog import Catalog
    from openpi_client.base_policy import BasePolicy

PROGRAM = "openpi serve"

# A policy that is still compiling when the server stops is not waited for any longer than this.
_ABANDON_AFTER_S = 1.0

logger = logging.getLogger(__name__)


def run_server(
    models: Catalog | Callable[[], BasePolicy],
    *,
    host: str,
    port: int,
    port_file: Path | None = None,
    api_key: str | None = None,
    options: Metadata | None = None,
    program: str = PROGRAM,
) -> int:
    """Serves models, or what a function makes, until SIGTERM or Ctrl-C; returns the exit code.

    Args:
        options: further ones of `PolicyServer`.
        program: for messages.
    Raises:
        ValueError, ImportError: `PolicyServer` refuses what it is given.
    """
    from openpi.serving.server import PolicyServer

    options = options or {}
    scheme = "wss" if options.get("tls") else "ws"
    server = PolicyServer(
        models,
        host=host,
        port=port,
        api_key=api_key_of(api_key),
        on_listening=functools.partial(announce, host, port_file, scheme),
        **options,
    )
    try:
        server.run()
        code = 0
    except (ValueError, LookupError, OSError, ImportError) as error:
        code = refuse(error, program)
    except Exception:
        logger.exception("The server failed")
        code = 1
    if not server.finish_thread(_ABANDON_AFTER_S):
        # Leaving the interpreter while a thread compiles can crash it; nothing here is left to be cleaned up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def announce(host: str, port_file: Path | None, scheme: str, port: int) -> None:
    """Says where the server is: in `port_file` (whole or not at all), and in the log."""
    if port_file is not None:
        whole_file.write_text(port_file, f"{port}\n")
    from openpi.serving.listener import as_place

    place = as_place(host, port)
    page = f"{scheme.replace('ws', 'http')}://{place}"
    logger.info("Policy server on %s://%s; status: %s; health: %s/healthz", scheme, place, page, page)
    if host.strip("[]") in ("0.0.0.0", "::"):
        logger.info("Reachable from the network as %s", _network_names())


def _network_names() -> str:
    import socket

    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:  # A host name that nobody resolves is no reason not to serve.
        return name
    return name if ipaddress.ip_address(address).is_loopback else f"{name} ({address})"
