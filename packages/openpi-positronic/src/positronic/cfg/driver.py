"""Who begins and ends episodes: `--driver=.keyboard`."""

from __future__ import annotations

import configuronic as cfn

from openpi_positronic.franka.stacking import TASK
from openpi_positronic.simulation.drivers import EvalUi, Keyboard, Timed

timed = cfn.Config(Timed, simulation_time=15.0, num_iterations=1, show_gui=False, task=TASK)
keyboard = cfn.Config(Keyboard, show_gui=False, task=TASK)
eval_ui = cfn.Config(EvalUi, show_gui=False, task=TASK)
