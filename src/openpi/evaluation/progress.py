"""A bar on a terminal, with a note beside it."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Update = Callable[[int, str], None]  # (done so far, a note)


@contextlib.contextmanager
def bar(console: Console, total: int) -> Iterator[Update]:
    """Yields the function that moves the bar; it may be called from another thread."""
    progress = Progress(
        TextColumn(" "),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = progress.add_task("", total=total, note="")
    with progress:
        yield lambda done, note: progress.update(task, completed=done, note=note)
