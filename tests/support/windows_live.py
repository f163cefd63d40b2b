"""Windows on a real screen, run as a program: `python windows_live.py cameras|judging FOLDER`."""

import contextlib
import sys
from pathlib import Path

from openpi_positronic.franka.env import CAMERAS
from openpi_positronic.franka.render import make_renderer
from openpi_positronic.franka.world import FrankaWorld
from openpi_positronic.raw_episodes import RawDataset, RawDatasetWriter
from openpi_positronic.simulation.drivers import EvalUi
from openpi_positronic.simulation.eval_panel import EvalPanel
from openpi_positronic.simulation.policies import ScriptedPolicy
from openpi_positronic.simulation.station import Station
from openpi_positronic.simulation.window import CameraWindow


def make_station(folder: Path | None, **options) -> Station:
    world = FrankaWorld()
    recordings = None if folder is None else RawDatasetWriter(folder)
    renderer = make_renderer(world, width=32, height=24)
    return Station(world, ScriptedPolicy(), renderer=renderer, cameras=CAMERAS, recordings=recordings, **options)


def cameras(folder: Path) -> None:
    """The window shows what the cameras see."""
    shown = []

    def show(frames) -> None:
        window.show(frames)
        image = window._images["image.exterior"]
        shown.append((image.width(), image.height(), image.get(0, 0), tuple(frames["image.exterior"][0, 0].tolist())))

    with contextlib.closing(CameraWindow()) as window:
        robot = make_station(None, on_frames=show)
        robot.run_for(0.2)
    assert len(shown) == 3
    for width, height, found, expected in shown:
        assert (width, height) == (64, 48)  # twice the size
        assert found == expected, (found, expected)
    window.show({})  # closing it stops the showing only


PRESSES = iter(
    [
        {"press": "start"},
        {"press": "stalled"},
        {"total_items": "2", "successful_items": "three", "press": "submit"},
        {"successful_items": "1", "notes": "slipped", "press": "submit"},
        {"press": "start"},
        {"press": "reset"},
        {"press": "start"},
        {"press": "finished"},
        {"press": "reset"},
    ]
)


class Pressed(EvalPanel):
    """The real panel, with somebody at its buttons: the next is pressed whenever the last has been dealt with."""

    def next_event(self) -> str:
        event = super().next_event()
        if event:
            return event
        wanted = next(PRESSES, None)
        if wanted is None:
            return "quit"
        button = self.buttons[wanted.pop("press")]
        for name, value in wanted.items():
            self.fields[name].set(value)
        assert not button.instate(["disabled"]), button
        button.invoke()
        return ""


def judging(folder: Path) -> None:
    """Somebody at the window begins, ends and judges episodes."""
    driver = EvalUi(task="wave", make_panel=Pressed)
    driver.check()
    driver.run(make_station(folder))
    dataset = RawDataset(folder)
    (episode,) = dataset
    assert not dataset.unfinished
    judged = {name: value for name, value in episode.static.items() if name.startswith("eval.")}
    assert abs(judged.pop("eval.duration") - episode.duration_ns / 1e9) < 0.003
    assert judged == {
        "eval.outcome": "Stalled",
        "eval.total_items": 2,
        "eval.successful_items": 1,
        "eval.notes": "slipped",
    }


if __name__ == "__main__":
    {"cameras": cameras, "judging": judging}[sys.argv[1]](Path(sys.argv[2]))
