"""What the demo says while it runs: the stages, the commands behind them, and a bar for each."""

from contextlib import AbstractContextManager

from rich.console import Console
from rich.text import Text

from openpi.evaluation.progress import Update, bar
from openpi.shared.children import Command


class Terminal:
    """Rich on a terminal; one plain line per event where output goes to a file."""

    def __init__(self, num_stages: int, console: Console | None = None):
        self._console = console or Console(highlight=False)
        self._num_stages = num_stages
        self._stage = 0

    def stage(self, title: str) -> None:
        self._stage += 1
        self._console.print()
        self._print(f"{self._stage}/{self._num_stages}  {title}", "bold cyan")

    def command(self, command: Command) -> None:
        """Never wrapped, so that it can be copied."""
        self._print(f"  $ {command}", "dim")

    def say(self, text: str, style: str = "") -> None:
        self._print(f"  {text}", style)

    def bar(self, total: int) -> AbstractContextManager[Update]:
        return bar(self._console, total)

    def _print(self, text: str, style: str) -> None:
        self._console.print(Text(text, style), soft_wrap=True)
