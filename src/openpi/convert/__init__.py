"""Recordings in other formats to LeRobot datasets, one format a file."""
