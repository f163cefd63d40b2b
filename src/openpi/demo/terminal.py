"""What the demo says while it runs: the stages, the commands behind them, and a bar for each."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from openpi.demo.plan import Command

Update = Callable[[int, str], None]  # (done so far, a note)


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

    @contextlib.contextmanager
    def bar(self, total: int) -> Iterator[Update]:
        """Yields the function that moves the bar; it may be called from another thread."""
        bar = Progress(
            TextColumn(" "),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        task = bar.add_task("", total=total, note="")
        with bar:
            yield lambda done, note: bar.update(task, completed=done, note=note)

    def _print(self, text: str, style: str) -> None:
        self._console.print(Text(text, style), soft_wrap=True)
