"""Recipes of two evaluations, under their published names; they are in `openpi.training.recipes`."""
