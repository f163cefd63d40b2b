"""A window to judge episodes with: buttons that begin and end them, and a form about each."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from openpi_positronic.simulation.window import open_window

START, RESET, SUBMIT, QUIT = "start", "reset", "submit", "quit"
OUTCOME_OF_BUTTON = {
    "finished": "Success",
    "fail": "Fail",
    "stalled": "Stalled",
    "safety": "Safety",
    "system": "System",
}
OUTCOMES = ("Success", "Fail", "Stalled", "Ran out of time", "Safety", "System")
_COUNTS = ("total_items", "successful_items")


@dataclass(frozen=True)
class Verdict:
    """What the form says."""

    outcome: str
    total_items: int
    successful_items: int
    notes: str

    def static(self, duration_s: float) -> dict[str, object]:
        """As constants of a recorded episode."""
        return {**{f"eval.{name}": value for name, value in vars(self).items()}, "eval.duration": duration_s}


class EvalPanel:
    """`next_event` gives the buttons pressed, in order: `start`, a key of `OUTCOME_OF_BUTTON`, `reset`, `submit`, and
    `quit` when the window is closed.

    Raises:
        ValueError: no display, or a Python without Tk.
    """

    def __init__(self) -> None:
        import tkinter
        from tkinter import ttk

        self._events: deque[str] = deque()
        self._root = root = open_window("openpi evaluation", "--driver=.eval_ui")
        root.protocol("WM_DELETE_WINDOW", lambda: self._events.append(QUIT))
        self._status = tkinter.StringVar(root, "ready")
        ttk.Label(root, textvariable=self._status).grid(row=0, column=0, columnspan=8, sticky="w")
        self.buttons = {
            name: ttk.Button(root, text=name.capitalize(), command=lambda name=name: self._events.append(name))
            for name in (START, *OUTCOME_OF_BUTTON, RESET)
        }
        for column, button in enumerate(self.buttons.values()):
            button.grid(row=1, column=column)
        self.fields = {"outcome": tkinter.StringVar(root, OUTCOMES[0])}
        self.fields |= {name: tkinter.StringVar(root, "1") for name in _COUNTS} | {"notes": tkinter.StringVar(root)}
        for row, (name, variable) in enumerate(self.fields.items(), start=2):
            ttk.Label(root, text=name.replace("_", " ")).grid(row=row, column=0, sticky="w")
            field = (
                ttk.OptionMenu(root, variable, OUTCOMES[0], *OUTCOMES)
                if name == "outcome"
                else ttk.Entry(root, textvariable=variable)
            )
            field.grid(row=row, column=1, columnspan=7, sticky="ew")
        self.buttons[SUBMIT] = ttk.Button(root, text="Save", command=lambda: self._events.append(SUBMIT))
        self.buttons[SUBMIT].grid(row=2 + len(self.fields), column=1)
        self.await_start()

    def next_event(self) -> str:
        """Handles the window; "" if no button was pressed."""
        self._root.update()
        return self._events.popleft() if self._events else ""

    def await_start(self) -> None:
        self._enable("ready", START, RESET)

    def await_end(self) -> None:
        self._enable("running", *OUTCOME_OF_BUTTON, RESET)

    def ask(self, outcome: str) -> None:
        """Opens the form."""
        self.fields["outcome"].set(outcome)
        self._enable("how was it?", SUBMIT, RESET)

    def verdict(self) -> Verdict | None:
        """What the form says; None if its numbers are none, and says so."""
        values = {name: variable.get() for name, variable in self.fields.items()}
        try:
            total, successful = (int(values[name]) for name in _COUNTS)
        except ValueError:
            total, successful = -1, 0
        if not 0 <= successful <= total:
            self._status.set("items must be whole numbers, and no more successful ones than there are")
            return None
        return Verdict(values["outcome"], total, successful, values["notes"])

    def close(self) -> None:
        self._root.destroy()

    def _enable(self, status: str, *names: str) -> None:
        self._status.set(status)
        for name, button in self.buttons.items():
            button.state(["!disabled" if name in names else "disabled"])
