"""Positronic's robots, recordings and protocol; `positronic` has its names.

franka       the simulated arm: physics, pictures, tasks, expert
simulation   a station around it that records, tick by tick
"""
