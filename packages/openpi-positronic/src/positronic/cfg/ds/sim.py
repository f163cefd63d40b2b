"""The public recordings of Positronic's simulator, where newer releases name them."""

from positronic.cfg.ds.phail import sim_pick_place, sim_stack_cubes

__all__ = ["sim_pick_place", "sim_stack_cubes"]
