"""The documented way to serve a policy from a program of one's own."""

import asyncio
from collections.abc import Mapping

from openpi.serving.server import DEFAULT_PORT, PolicyServer
from openpi_client.base_policy import BasePolicy


class WebsocketPolicyServer:
    """Serves any `BasePolicy`, one inference at a time, with `/healthz` on the same port.

    WebsocketPolicyServer(MyPolicy(), port=8000).serve_forever()
    """

    def __init__(
        self,
        policy: BasePolicy,
        host: str = "0.0.0.0",
        port: int | None = None,
        metadata: Mapping[str, object] | None = None,
        *,
        api_key: str | None = None,
    ) -> None:
        """
        Args:
            host: the default opens the port to the network; "127.0.0.1" keeps it on this machine.
            port: None means 8000; 0 chooses a free one.
            metadata: the map that every client gets first; None means an empty one.
            api_key: when set, clients must send it.
        """
        self._server = PolicyServer(
            lambda: policy,
            host=host,
            port=DEFAULT_PORT if port is None else port,
            metadata=metadata or {},
            api_key=api_key,
        )

    def serve_forever(self) -> None:
        """Blocks until SIGTERM or SIGINT, then finishes the running requests and returns."""
        try:
            self._server.run()
        finally:
            self._server.finish_thread(timeout_s=0)

    def stop(self) -> None:
        """Ends `serve_forever`, from another thread."""
        self._server.stop()

    async def run(self) -> None:
        """`serve_forever` for programs that have an event loop already; ends when it is cancelled."""
        serving = asyncio.ensure_future(asyncio.to_thread(self._server.run))
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            self._server.stop()
            await serving
            raise
