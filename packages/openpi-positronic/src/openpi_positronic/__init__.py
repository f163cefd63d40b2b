"""Positronic's robots, recordings and protocol; `positronic` has its names.

codecs           raw signals of a robot <-> keys of a policy
raw_episodes     its recordings                      conversion   a format of `openpi convert`
session          its protocol (`session_parameters`, `protocol`)
policy, recipes  what is trained on them             recipe_types what files may name of it
franka           the simulated arm                   simulation   a station around it that records, tick by tick
"""
