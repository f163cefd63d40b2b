"""A whole LeRobot dataset looked at: every column, a few frames of every camera, all metadata, against each other.

One file per group of checks, each a function of what was opened (`subject.py`) that yields findings
(`findings.py`). `runner.py` puts them together: the fast half, which reads tables only, and the half that decodes
pictures. What refuses a dataset when it is opened (`data/lerobot/`) is asked here too, episode by episode.
"""
